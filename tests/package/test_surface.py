"""`import crcm_jax`: what it shows, and what it costs."""

import inspect
import pkgutil
import subprocess
import sys

import pytest

import crcm_jax
from crcm_jax.errors import MissingPackage, UserError, need


@pytest.mark.parametrize("name", crcm_jax.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(crcm_jax, name)
    words = inspect.getdoc(value)
    assert words and not words.startswith(f"{name}("), "a dataclass's own signature is no documentation"
    assert name in dir(crcm_jax)
    assert name in crcm_jax.__doc__.replace(",", " ").split(), "the package's docstring names it"


def test_no_public_name_is_a_sub_packages():
    modules = {module.name for module in pkgutil.iter_modules(crcm_jax.__path__)}
    assert not modules & set(crcm_jax._HOMES)
    assert set(crcm_jax._MODULES) <= modules


def test_a_wrong_name_is_one_sentence():
    with pytest.raises(AttributeError, match=r"crcm_jax has no 'Chunk': dir\(crcm_jax\) lists"):
        _ = crcm_jax.Chunk


def test_importing_loads_nothing():
    code = "import sys, crcm_jax; dir(crcm_jax); sys.exit(bool({'jax', 'numpy', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(MissingPackage, match=r"needs sklearn: pip install 'causal-rcm-jax\[demo\]'") as caught:
        need("sklearn.datasets", extra="demo")
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ImportError)


def test_a_package_that_lacks_something_of_its_own_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text("import thing_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="thing_that_is_not_there"):
        need("halfway", extra="demo")
