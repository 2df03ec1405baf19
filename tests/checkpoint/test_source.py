"""Nothing in the source can run code that came with data: no pickle, no eval, no unsafe loaders."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hasten

SOURCE = Path(hasten.__file__).parent
UNSAFE_MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle",
}  # fmt: skip
UNPICKLER = ("Unpickler", "UnpicklingError")
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
# The one reader of a foreign pickle, a subclass of pickle.Unpickler that knows only NumPy arrays and strings.
RESTRICTED = "data"


def findings(text: str, unpickler: bool = False) -> list[str]:
    """Return what is unsafe in a source text; ``unpickler`` permits `pickle.Unpickler` as a base class."""
    found = []
    tree = ast.parse(text)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [a.name for a in names if a.name.split(".")[0] in UNSAFE_MODULES and not unpickler]
            case ast.ImportFrom(module=module) if module and module.split(".")[0] in UNSAFE_MODULES:
                found.append(module)
            case ast.Constant(value=str(word)) if word in UNSAFE_MODULES:
                found.append(repr(word))
            case ast.Attribute(attr="load_state_dict_from_url") | ast.Name(id="load_state_dict_from_url"):
                found.append("load_state_dict_from_url")
            case ast.alias(name="load_state_dict_from_url"):
                found.append("load_state_dict_from_url")
            case ast.Attribute(value=ast.Name(id="pickle"), attr=attr) if attr not in UNPICKLER:
                found.append(f"pickle.{attr}")
            case ast.Call(func=ast.Name(id=name)) if name in UNSAFE_CALLS:
                found.append(f"{name}()")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="builtins"), attr=name)) if (
                name in UNSAFE_CALLS
            ):
                found.append(f"builtins.{name}()")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                if not any(k.arg == "weights_only" and _is(k.value, True) for k in keywords):
                    found.append("torch.load without weights_only=True")
            case ast.keyword(arg="weights_only", value=value) if not _is(value, True):
                found.append("weights_only that is not True")
            case ast.keyword(arg="allow_pickle", value=value) if not _is(value, False):
                found.append("allow_pickle that is not False")
            case ast.Call(func=ast.Name(id="Unpickler") | ast.Attribute(attr="Unpickler")):
                found.append("an unrestricted Unpickler")
    return found


def _is(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def is_restricted(path: Path) -> bool:
    """Whether the file holds a subclass of `pickle.Unpickler` that decides itself what may be loaded."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and any(
            ast.unparse(base) == "pickle.Unpickler" for base in node.bases
        ):
            return any(isinstance(item, ast.FunctionDef) and item.name == "find_class" for item in node.body)
    return False


def test_no_source_file_loads_code_from_data() -> None:
    found, restricted = {}, []
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        relative = path.relative_to(SOURCE)
        unpickler = relative.parts[0] == RESTRICTED and is_restricted(path)
        restricted += [relative] if unpickler else []
        if bad := findings(path.read_text(), unpickler):
            found[str(relative)] = bad
    assert not found
    assert len(restricted) <= 1, restricted


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "import dill",
        "from joblib import load",
        "importlib.import_module('pickle')", "__import__('os')", "eval('1')", "exec(text)",
        "builtins.eval('1')",
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
        "f(weights_only=False)", "np.load(path, allow_pickle=True)",
        "torch.hub.load_state_dict_from_url(url)",
        "from torch.hub import load_state_dict_from_url", "import marshal",
    ],
)  # fmt: skip
def test_the_scan_finds(text: str) -> None:
    assert findings(text)


@pytest.mark.parametrize(
    "text", ["pickle.loads(x)", "pickle.Unpickler(file).load()", "from pickle import load"]
)
def test_the_scan_finds_even_beside_the_restricted_unpickler(text: str) -> None:
    assert findings(text, unpickler=True)


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "re.compile('x')",
        "torch.load(p, weights_only=True)",
        "np.load(p, allow_pickle=False)",
        "'no pickle'",
    ],
)
def test_the_scan_lets_pass(text: str) -> None:
    assert not findings(text)
