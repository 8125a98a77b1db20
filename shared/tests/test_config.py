from dataclasses import dataclass, field

import pytest
from effml_shared.config import field_names, load_config, to_dict, to_yaml
from effml_shared.errors import ConfigError


@dataclass
class Model:
    width: int = 64
    rates: list[float] = field(default_factory=lambda: [0.1, 0.2])
    name: str = "a"
    window: int | None = None

    def __post_init__(self):
        if self.width < 1:
            raise ConfigError(f"model.width: got {self.width}, expected an integer >= 1")


@dataclass
class Config:
    model: Model = field(default_factory=Model)
    steps: int = 3
    clip: bool = False


def test_later_layers_win_and_the_base_is_untouched(tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 5\nmodel: {width: 8, rates: [1, 2.5]}\n")
    base = Config()
    got = load_config(base, yaml=tmp_path / "c.yaml", overrides=["model.width=16", "model.window=3", "clip=true"])
    assert got == Config(Model(16, [1.0, 2.5], "a", 3), 5, True)
    assert base == Config()
    assert isinstance(got.model.rates[0], float)


def test_resolved_config_reads_back(tmp_path):
    config = Config(Model(7, [3e-4], "x=y: [", 2), 9, True)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(Config(), yaml=tmp_path / "c.yaml") == config
    assert to_dict(config)["model"]["rates"] == [3e-4]


def test_field_names_are_dotted():
    assert list(field_names(Config))[:2] == ["model", "model.width"]


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("model.widht=3", ["model.widht", "did you mean model.width?"]),
        ("width=3", ["unknown field width", "model.width"]),
        ("model.width=abc", ["model.width", "'abc'", "int"]),
        ("model.width=1.5", ["model.width", "1.5", "int"]),
        ("model.width=-1", ["model.width", "-1", ">= 1"]),
        ("model.width=", ["model.width", "int"]),
        ("model=3", ["model", "width"]),
        ("steps=[1", ["steps", "YAML"]),
        ("steps", ["key=value"]),
        ("=3", ["key=value"]),
        ("clip=maybe", ["clip", "bool"]),
        ("model.rates=[a]", ["model.rates", "'a'"]),
        ("model.rates=3", ["model.rates", "list[float]"]),
        ("steps=null", ["steps", "int"]),
        ("steps={a: 1}", ["steps", "int"]),
        ("steps=${foo}", ["steps", "foo"]),
        ("model.width.x=3", ["model.width", "int"]),
        ("a.b.c=1", ["unknown field a"]),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(word, parts):
    with pytest.raises(ConfigError) as caught:
        load_config(Config(), overrides=[word])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"steps: [1", "invalid YAML"), (b"\xff\xfe\x00", "c.yaml"), (b"- 1\n- 2\n", "list"), (b"stesp: 3", "steps")],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, content, part):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(Config(), yaml=tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)
    assert part in str(caught.value)
    assert "c.yaml" in str(caught.value)


def test_a_missing_file_and_a_directory_are_told_apart(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(Config(), yaml=tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="a directory"):
        load_config(Config(), yaml=tmp_path)


@pytest.mark.parametrize("text", ["steps: 3\n", "steps: 3\n" * 500, "steps" * 500], ids=["short", "long", "one line"])
def test_yaml_in_place_of_its_path_is_one_short_line(text):
    with pytest.raises(
        ConfigError, match=r"^config file 'steps.*'\.\.\.: got .*, expected the path of a YAML"
    ) as caught:
        load_config(Config(), yaml=text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@dataclass(frozen=True)
class Frozen:
    width: int = 3


@dataclass
class Outer:
    inner: Frozen = field(default_factory=Frozen)


def test_frozen_dataclasses_are_laid_over_too():
    assert load_config(Outer(), overrides=["inner.width=5"]).inner.width == 5
