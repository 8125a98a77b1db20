"""Every check of the workspace, by name: `nox` runs the default ones, `nox --list` shows all."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "walls", "tests", "integration", "docs", "numbers"]

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
PACKAGES = {"shared": "shared"} | {p.name[6:]: f"packages/{p.name}" for p in sorted(ROOT.glob("packages/effml-*"))}
# What a package's own tests need beyond its plain installation.
EXTRAS = {
    "shared": "[data,sweep]",
    "optim": "[hf]",
    "quant": "[hf]",
    "arch": "[hf]",
    "diffusion": "[hf]",
    "rl": "[hf,lora,math]",
    "eval": "[hf,harness]",
}
PEERS = {"quant": ["quant-peers"]}  # what only one package's tests compare with
SOURCES = [f"{path}/src" for path in PACKAGES.values()]
FAST = ["-m", "not slow and not gpu"]
# Two processes of one thread: the tests' tensors are tiny, and threads that wait would take the other's core.
PARALLEL = ["-n", "2"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def groups(*names: str) -> list[str]:
    return list(nox.project.dependency_groups(PROJECT, *names))


def editable(*packages: str) -> list[str]:
    paths = [f"{PACKAGES[name]}{EXTRAS.get(name, '')}" for name in packages]
    return [word for path in paths for word in ("-e", path)]


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting and lint."""
    session.install(*groups("lint"))
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types of everything that is shipped."""
    session.install(*groups("types", "test", "dev"), *editable(*PACKAGES))
    session.run("mypy", *SOURCES, "noxfile.py", "release", env={"MYPYPATH": "release"})


@nox.session
def walls(session: nox.Session) -> None:
    """No package imports a sibling, the core imports no package, no floor imports one above it."""
    session.install(*groups("walls"))
    session.install("--no-deps", *[word for path in PACKAGES.values() for word in ("-e", path)])
    session.run("lint-imports", "--no-cache")


@nox.session
@nox.parametrize("package", list(PACKAGES), ids=list(PACKAGES))
def tests(session: nox.Session, package: str) -> None:
    """Unit tests of one package, with only that package and the core installed."""
    unit_tests(session, package)


def unit_tests(session: nox.Session, package: str) -> None:
    session.install(*groups("test", "peers", *PEERS.get(package, [])), *editable(*dict.fromkeys(["shared", package])))
    session.run("pytest", f"{PACKAGES[package]}/tests", *FAST, *PARALLEL, *session.posargs, env=ONE_THREAD)


@nox.session
def integration(session: nox.Session) -> None:
    """What only several packages together can show."""
    session.install(*groups("test", "peers"), *editable(*PACKAGES))
    session.run("pytest", "integration_tests", *FAST, *PARALLEL, *session.posargs, env=ONE_THREAD)


@nox.session
def docs(session: nox.Session) -> None:
    """Doctests, the READMEs' examples and commands, links."""
    session.install(*groups("test", "peers"), *editable(*PACKAGES))
    session.run("pytest", "--doctest-modules", *SOURCES, "docs/measured", env={**ONE_THREAD, "PYTHONPATH": "docs"})
    session.run("pytest", "docs", env=ONE_THREAD)


@nox.session
def numbers(session: nox.Session) -> None:
    """Measured numbers of the pages: `-- write` writes them from docs/results, `-- record DIR...` takes runs over."""
    if session.posargs not in ([], ["write"]) and not (session.posargs[0] == "record" and session.posargs[1:]):
        session.error("usage: nox -s numbers, nox -s numbers -- write, or nox -s numbers -- record DIR...")
    session.install(*groups("numbers"), *editable("shared"))
    if session.posargs[:1] == ["record"]:
        session.run("python", "docs/measured/record.py", *session.posargs[1:])
    how = ["-r"] if session.posargs else ["--check", "--diff", "--check-fail-msg=run: nox -s numbers -- write"]
    pages = ["README.md", *(f"{path}/README.md" for path in PACKAGES.values())]
    session.run("cog", *how, "-P", "-I", "docs", "-p", "from measured import *", *pages)


@nox.session(default=False)
def slow(session: nox.Session) -> None:
    """Tests marked slow, of every package."""
    session.install(*groups("test", "peers"), *editable(*PACKAGES))
    session.run("pytest", *[f"{path}/tests" for path in PACKAGES.values()], "integration_tests", "-m", "slow")


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Tests marked gpu; they skip loudly without one."""
    session.install(*groups("test", "peers"), *editable(*PACKAGES))
    session.run("pytest", "-rs", *[f"{path}/tests" for path in PACKAGES.values()], "-m", "gpu", success_codes=[0, 5])


@nox.session(default=False, reuse_venv=False)  # installing over what is there would keep newer versions
@nox.parametrize("package", list(PACKAGES), ids=list(PACKAGES))
def lowest(session: nox.Session, package: str) -> None:
    """Unit tests against the lowest versions that the package says it supports."""
    needs = [*groups("test"), "accelerate>=1.10.1", *editable(*dict.fromkeys(["shared", package]))]
    session.install("--resolution", "lowest-direct", *needs)
    old = ["-W", "default::DeprecationWarning", "-W", "default::UserWarning"]  # old releases warn about one another
    session.run("pytest", f"{PACKAGES[package]}/tests", *FAST, *PARALLEL, *old, *session.posargs, env=ONE_THREAD)


@nox.session(default=False, python=["3.11", "3.12", "3.13"])
@nox.parametrize("package", list(PACKAGES), ids=list(PACKAGES))
def python(session: nox.Session, package: str) -> None:
    """Unit tests of one package on one of the supported Pythons (`nox -s "python-3.13(quant)"`)."""
    unit_tests(session, package)


@nox.session(default=False, venv_backend="none")
def build(session: nox.Session) -> None:
    """Build every wheel into dist/."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("uv", "build", "--all-packages", "--wheel", "--out-dir", "dist", external=True)


@nox.session(default=False, venv_backend="none", requires=["build"])
@nox.parametrize("package", list(PACKAGES), ids=list(PACKAGES))
def wheels(session: nox.Session, package: str) -> None:
    """One wheel and the core's in an empty environment: a newcomer's first minutes, then the package's tests."""
    found = [next((ROOT / "dist").glob(f"effml_{name}-*.whl")) for name in dict.fromkeys([package, "shared"])]
    try_wheel(session, package, *found, options=session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Benchmarks of one package against its peers (`nox -s bench -- optim`): one JSON line per case, and a table."""
    session.install(*groups("bench"), *editable(*PACKAGES))
    for name in session.posargs or ["optim", "quant", "arch", "diffusion", "rl", "eval"]:
        for script in sorted((ROOT / PACKAGES[name] / "benchmarks").glob("bench_*.py")):
            session.run("python", str(script), "--table")


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """Build one package (`nox -s release -- quant`), try its wheel, print the tag to push. Publishes nothing."""
    name = session.posargs[0].replace("_", "-").removeprefix("effml-") if len(session.posargs) == 1 else ""
    if name not in PACKAGES:
        session.error(f"usage: nox -s release -- PACKAGE, one of {', '.join(f'effml-{known}' for known in PACKAGES)}")
    session.install(*groups("release"))
    rules = ["python", "release/rules.py", name]
    tag = said(session, *rules)
    out, built = ROOT / "dist" / tag, Path(session.create_tmp()) / "core"
    for folder in (out, built):
        shutil.rmtree(folder, ignore_errors=True)
    build = ["uv", "build", "--quiet", "--out-dir"]
    session.run(*build, str(out), "--package", f"effml-{name}", external=True)  # the wheel from the source archive
    session.run("python", "release/archives.py", name, str(out))
    wheel, archive = next(out.glob("*.whl")), next(out.glob("*.tar.gz"))
    session.run("twine", "check", "--strict", str(wheel), str(archive))
    if name == "shared":
        try_wheel(session, name, wheel)
    else:
        session.run(*build, str(built / "newest"), "--package", "effml-shared", "--wheel", external=True)
        lowest_tag = said(session, *rules, "--lowest-core")
        if lowest_tag:
            source = built / "source.tar"
            session.run("git", "archive", "--output", str(source), lowest_tag, "shared", external=True)
            shutil.unpack_archive(source, built, filter="data")
            session.run(*build, str(built / "lowest"), "--wheel", str(built / "shared"), external=True)
        for core in sorted(built.glob("*/effml_shared-*.whl")):
            session.log(f"with {core.parent.name} {core.name}{'' if lowest_tag else ', the only one allowed'}")
            try_wheel(session, name, wheel, core)
    session.log(f"{out.relative_to(ROOT)} holds what to publish; the tag: git tag {tag} && git push origin {tag}")


def said(session: nox.Session, *command: str) -> str:
    """Run a command and return what it printed; its warnings go to the terminal."""
    return str(session.run(*command, silent=True, stderr=None)).strip()


def try_wheel(session: nox.Session, name: str, wheel: Path, *core: Path, options: Sequence[str] = ()) -> None:
    """Install a wheel in an empty environment; try it with nothing but what it asks for, then run its quick tests."""
    fresh = Path(session.create_tmp()) / "fresh"
    python = str(fresh / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    install = ["uv", "pip", "install", "--quiet", "--python", python, *map(str, core)]
    session.run("uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(fresh), external=True)
    session.run(*install, str(wheel), external=True)
    session.run(python, "-I", "release/first_minutes.py", f"effml-{name}", env=ONE_THREAD, external=True)
    needs = groups("test", "peers", *PEERS.get(name, []))
    session.run(*install, f"{wheel}{EXTRAS.get(name, '')}", *needs, external=True)
    tests = [f"{PACKAGES[name]}/tests", *FAST, *PARALLEL, *options]
    session.run(python, "-m", "pytest", "-q", *tests, env=ONE_THREAD, external=True)
