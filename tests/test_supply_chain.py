"""What enters an installation and a wheel: locked packages with hashes, and the list of what is compiled in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qaa import _core

ROOT = Path(__file__).parent.parent
LOCKS = ROOT / "requirements"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NOT_LOCKED = "torch"  # its builds differ from machine to machine


def locked(name: str) -> list[tuple[Requirement, list[str]]]:
    """The packages of a lock, with their hashes."""
    text = re.sub(r"^\s*#.*\n", "", (LOCKS / f"{name}.txt").read_text("utf-8"), flags=re.MULTILINE)
    words = [line.split() for line in text.replace("\\\n", " ").splitlines()]
    return [
        (
            Requirement(" ".join(word for word in line if not word.startswith("--hash="))),
            [word.removeprefix("--hash=") for word in line if word.startswith("--hash=")],
        )
        for line in words
        if line
    ]


def environments() -> list[dict[str, str]]:
    systems = (("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64"))
    return [
        {
            **default_environment(), "python_version": python, "python_full_version": f"{python}.0",
            "implementation_version": f"{python}.0", "sys_platform": platform, "platform_system": system,
            "platform_machine": machine,
        }
        for python in PYTHONS
        for platform, system, machine in systems
    ]  # fmt: skip


def applies(requirement: Requirement, environment: dict[str, str], extras: set[str]) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({**environment, "extra": extra}) for extra in extras | {""})


def required(extra: str, environment: dict[str, str]) -> list[Requirement]:
    """What the project asks for with an extra, those that it includes being followed."""
    asked = [Requirement(line) for line in importlib.metadata.requires("qaa") or []]
    extras, before = {extra}, 0
    while len(extras) > before:
        before = len(extras)
        for requirement in asked:
            if requirement.name == "qaa" and applies(requirement, environment, extras):
                extras |= requirement.extras
    return [r for r in asked if r.name != "qaa" and applies(r, environment, extras)]


@pytest.mark.parametrize("name", ["compare", "dev"])
def test_a_lock_satisfies_the_project_on_every_python_and_system(name: str) -> None:
    packages = [requirement for requirement, _ in locked(name)]
    for environment in environments():
        versions: dict[str, str] = {}
        for package in packages:
            if applies(package, environment, set()):
                assert canonicalize_name(package.name) not in versions, f"{package} is there twice"
                versions[canonicalize_name(package.name)] = next(iter(package.specifier)).version
        wanted = required(name, environment)
        assert {"numpy", "peft", NOT_LOCKED} <= {requirement.name for requirement in wanted}
        for requirement in wanted:
            if requirement.name != NOT_LOCKED:
                version = versions.get(canonicalize_name(requirement.name))
                assert version is not None, f"{requirement} is not locked"
                assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version} is locked"


def test_locked_packages_have_hashes_and_agree() -> None:
    seen: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for name in ("build", "compare", "dev"):
        for package, hashes in locked(name):
            (pin,) = package.specifier
            assert pin.operator == "==" and package.url is None and package.name != NOT_LOCKED
            assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in hashes)
            key = canonicalize_name(package.name), str(package.marker)
            if name == "compare":  # dev holds compare: one environment serves both
                seen[key] = pin.version, hashes
            elif name == "dev" and key in seen:
                assert seen.pop(key) == (pin.version, hashes), package
    assert not [key for key in seen if not any(canonicalize_name(p.name) == key[0] for p, _ in locked("dev"))]


def test_locks_keep_the_constraints() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    for constraint in map(Requirement, lines):
        if constraint.name == NOT_LOCKED:
            continue
        for name in ("compare", "dev"):
            versions = {
                next(iter(p.specifier)).version
                for environment in environments()
                if applies(constraint, environment, set())
                for p, _ in locked(name)
                if canonicalize_name(p.name) == constraint.name and applies(p, environment, set())
            }
            # pennylane is in dev alone
            assert versions <= {next(iter(constraint.specifier)).version}, constraint
            assert versions or (constraint.name, name) == ("pennylane", "compare")


def bill_of_materials() -> dict[str, Any]:
    files = [file for file in importlib.metadata.files("qaa") or [] if file.match("*.dist-info/sboms/qaa.cdx.json")]
    assert len(files) == 1, "expected one bill of materials in the installed package"
    found: dict[str, Any] = json.loads(Path(str(files[0].locate())).read_text("utf-8"))
    return found


def test_the_bill_of_materials_lists_what_is_compiled_in() -> None:
    bill = bill_of_materials()
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    subject = bill["metadata"]["component"]
    assert (subject["name"], subject["version"]) == ("qaa", importlib.metadata.version("qaa"))
    components = {component["bom-ref"]: component for component in bill["components"]}
    names = {component["name"] for component in components.values()}
    assert names == {"pybind11", "xla/ffi/api/c_api.h"} | ({"NVIDIA CUDA runtime"} if _core.cuda_is_built() else set())
    assert bill["dependencies"] == [{"ref": subject["bom-ref"], "dependsOn": list(components)}]
    assert all(component["version"] and component["licenses"] for component in components.values())


def test_the_bill_of_materials_has_the_versions_that_were_compiled() -> None:
    components = {component["name"]: component for component in bill_of_materials()["components"]}
    header = (ROOT / "csrc/third_party/xla/ffi/api/c_api.h").read_bytes()
    numbers = re.findall(rb"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header)
    xla = components["xla/ffi/api/c_api.h"]
    assert xla["version"] == b".".join(numbers).decode()
    assert xla["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(header).hexdigest()}]
    try:  # `make` builds with the pybind11 of this environment
        assert components["pybind11"]["version"] == importlib.metadata.version("pybind11")
    except importlib.metadata.PackageNotFoundError:
        assert re.fullmatch(r"\d+\.\d+\.\d+", components["pybind11"]["version"])
