"""YAML files of options."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fsr_vllm.compat.patching import Patch
from fsr_vllm.compat.types import Function, Parser

LOAD_CONFIG_FILE = Patch(
    "vllm.utils.argparse_utils:FlexibleArgumentParser.load_config_file",
    "vLLM turns `off` into `--no-NAME`, but only where the parser that reads the file has that "
    "option. `vllm serve` reads it with the parser above the subcommand's, which has none, and "
    "leaves the line out unsaid.",
    "vLLM asks the subcommand's parser",
    signature="(self, file_path)",
    read="0.27-0.32",
)


def wrap_config_files(no_options: Callable[[Mapping[str, object]], list[str]]) -> None:
    """Let no_options(content) add arguments to those that vLLM makes of a YAML file."""
    import yaml

    def make(stock: Function) -> Function:
        def load_config_file(self: Parser, file_path: str) -> list[str]:
            arguments = stock(self, file_path)
            with open(file_path) as file:
                content = yaml.safe_load(file)
            added = no_options(content) if isinstance(content, Mapping) else []
            return [*arguments, *(argument for argument in added if argument not in arguments)]

        return load_config_file

    LOAD_CONFIG_FILE.apply(make)
