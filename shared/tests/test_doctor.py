from effml_shared.doctor import examine


def test_it_measures_and_lists():
    rows = {row["what"]: row for row in examine()}
    assert float(rows["matrix product, cpu float32"]["finding"].split()[0].replace(",", "")) > 0
    assert "x float32" in rows["matrix product, cpu bfloat16"]["remark"]
    assert rows["effml-shared"]["finding"] == "0.1.0"
    for row in rows.values():
        assert row["finding"]
        assert row["finding"] != "not installed" or row["remark"]
