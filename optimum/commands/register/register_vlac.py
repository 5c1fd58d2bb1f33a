"""`optimum-cli export vla CHECKPOINT OUT --target onnx-int8`: vlac as a plug-in of Optimum's command line.

No __init__.py on the way here: `optimum` is a namespace package, and its command line imports every module of
optimum.commands.register that is named register_*.
"""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class VlaExportCommand(BaseOptimumCLICommand):
    """Compiles a vision-language-action checkpoint; the arguments are those of `vlac compile`."""

    COMMAND = CommandInfo(name="vla", help="Compile a vision-language-action policy with vlac, the VLA compiler.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("checkpoint", help="a policy's folder, or its hub id")
        parser.add_argument("output", help="where the artifact goes")
        parser.add_argument("--target", default="onnx-fp32", help="vlac list shows the targets")
        parser.add_argument("--pass", dest="passes", action="append", default=[], metavar="NAME:KEY=VALUE,...")
        parser.add_argument("--stats-key", default=None, help="whose statistics to use where a checkpoint has several")

    def run(self) -> None:
        import vlac

        args = self.args
        vlac.compile(args.checkpoint, target=args.target, out=args.output, passes=args.passes, stats_key=args.stats_key)
        print(f"{args.output}: {args.target}; try `vlac parity {args.output}`")


REGISTER_COMMANDS = [(VlaExportCommand, ExportCommand)]
