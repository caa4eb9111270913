"""The goldens are what their scripts made: sums always, the model's numbers anew where the reference is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parent
GOLDENS = TESTS / "goldens"
sys.path.insert(0, str(TESTS / "reference"))

from manifest import files_of, sha256  # noqa: E402

MANIFESTS = sorted(GOLDENS.glob("*/manifest.json"))
MISSING = [name for name in ("torch", "transformers", "safetensors") if find_spec(name) is None]


def test_every_folder_has_a_manifest() -> None:
    folders = sorted(path for path in GOLDENS.iterdir() if path.is_dir())
    assert [path.parent for path in MANIFESTS] == folders
    assert GOLDENS / "model" in folders


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.parent.name)
def test_files_are_as_the_script_left_them(manifest: Path) -> None:
    stated = json.loads(manifest.read_text(encoding="utf-8"))
    folder = manifest.parent
    assert {str(path.relative_to(folder)): sha256(path) for path in files_of(folder)} == stated["files"]
    assert (TESTS.parent / stated["script"]).is_file()
    assert stated["versions"]


@pytest.mark.skipif(bool(MISSING), reason=f"needs the extra `reference`: no {', '.join(MISSING)}")
def test_the_reference_gives_the_model_goldens_again(tmp_path: Path) -> None:
    """Ids, positions and settings exactly; floats within 1e-4, what another CPU's sums may differ by."""
    script = TESTS / "reference" / "make_model_goldens.py"
    made = subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    old = {path.relative_to(GOLDENS / "model"): path for path in files_of(GOLDENS / "model")}
    new = {path.relative_to(tmp_path): path for path in files_of(tmp_path)}
    assert new.keys() == old.keys()
    for name, path in old.items():
        if path.suffix != ".npz":
            assert new[name].read_bytes() == path.read_bytes(), name
            continue
        with np.load(path) as stated, np.load(new[name]) as found:
            assert set(found) == set(stated), name
            for key in stated:
                # bfloat16 sums that differ in the last bit differ by that bit's size
                atol = 0 if stated[key].dtype.kind in "iu" else 0.25 if key.startswith("bfloat16") else 1e-4
                np.testing.assert_allclose(found[key], stated[key], rtol=0, atol=atol, err_msg=f"{name} {key}")
