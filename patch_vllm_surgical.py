"""Step 4: put SEDAC into the installed vLLM, or take it out again.

    python patch_vllm_surgical.py --dry-run      # show the unified diff, write nothing
    python patch_vllm_surgical.py                # patch
    python patch_vllm_surgical.py --check        # say whether it is patched (exit 0) or not (exit 1)
    python patch_vllm_surgical.py --revert       # restore vLLM's file byte for byte

The patch is a dozen lines in vLLM's model_executor/models/qwen2.py that call sedac_core.vllm_runtime where SEDAC_ENABLED=1;
with SEDAC_ENABLED unset or 0 the patched model builds the graph that stock vLLM builds.
"""

import argparse
from pathlib import Path

from sedac_core import cli, vllm_patch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="the qwen2.py to patch (default: the installed vLLM's)")
    parser.add_argument("--untested", action="store_true", help="allow a vLLM that SEDAC's tests have not run")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="print the diff and write nothing")
    action.add_argument("--revert", action="store_true", help="restore the file that was there before the patch")
    action.add_argument("--check", action="store_true", help="say whether the file carries this SEDAC's patch")
    return parser.parse_args()


def main() -> int | None:
    args = parse_args()
    path = args.target or vllm_patch.find_target()
    if args.dry_run:
        print(vllm_patch.diff(path, args.untested) or f"{path} is already patched: nothing to do")
    elif args.revert:
        print(vllm_patch.revert(path))
    elif args.check:
        target = vllm_patch.Target.read(path)
        print(f"{target.path}: vLLM {target.version}, {target.state()}")
        return 0 if target.state() == "patched" else 1
    else:
        print(vllm_patch.patch(path, args.untested))


if __name__ == "__main__":
    cli.run(main)
