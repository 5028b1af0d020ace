"""The `fsr-vllm` command: demo, demo-model, methods."""

from __future__ import annotations

import argparse
import sys


def _demo(args: argparse.Namespace) -> int:
    from fsr_vllm.demo.command import run

    return run(args.model, args.log)


def _demo_model(args: argparse.Namespace) -> int:
    from fsr_vllm.demo import demo_model

    print(demo_model())
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    import fsr_vllm
    from fsr_vllm import cli_methods

    parser = argparse.ArgumentParser(
        prog="fsr-vllm", description="Visual-token pruning for vLLM, per request."
    )
    parser.add_argument("--version", action="version", version=fsr_vllm.__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    cli_methods.add_parser(commands)
    demo = commands.add_parser(
        "demo", help="serve the bundled model with the plugin and ask it at several budgets"
    )
    demo.add_argument("--model", help="a LLaVA checkpoint instead of the bundled one")
    demo.add_argument("--log", help="keep the server's log in this file")
    demo.set_defaults(run=_demo)
    bundled = commands.add_parser("demo-model", help="print the folder of the bundled model")
    bundled.set_defaults(run=_demo_model)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
