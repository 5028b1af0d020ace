"""YAML files of options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fsr_vllm.compat.patching import wrap_method


def wrap_config_files(no_options: Callable[[Mapping[str, Any]], list[str]]) -> None:
    """Let no_options(content) add arguments to those vLLM makes of a YAML file; safe to call twice.

    Why: vLLM turns `off` into `--no-NAME`, but only where the parser that reads the file has that
    option; `vllm serve` reads it with the parser above the subcommand's, which has none, and leaves
    the line out unsaid. A method `load_config_file(path) -> list of arguments` in 0.27-0.32. Can go
    when vLLM asks the subcommand's parser.
    """
    import yaml
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def make(stock: Any) -> Any:
        def load_config_file(self: Any, file_path: str) -> list[str]:
            arguments = stock(self, file_path)
            with open(file_path) as file:
                content = yaml.safe_load(file)
            added = no_options(content) if isinstance(content, Mapping) else []
            return [*arguments, *(argument for argument in added if argument not in arguments)]

        return load_config_file

    wrap_method(FlexibleArgumentParser, "load_config_file", make)
