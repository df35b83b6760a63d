"""`chex convert`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from space_app.user_errors import ErrorReporter


if TYPE_CHECKING:
    from space_app.convert import Conversion


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


convert_app = typer.Typer(
    name="convert",
    help="Turn published checkpoints into model folders. Nothing of a checkpoint is run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Output = Annotated[Path, typer.Argument(metavar="OUT", help="New model folder.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the weights that are written.")]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest weight file, like 2GB or 500MB.")]
ClipTokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|ID|FILE",
        help="Prompt tokenizer: folder, Hub id, or CLIP's bpe_simple_vocab_16e6.txt.gz. Default: CLIP's, if it is in "
        "the Hub cache.",
    ),
]
NoTokenizers = Annotated[
    bool, typer.Option("--no-tokenizers", help="Write model and image processor alone; say what is missing.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that is there already.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]


@convert_app.command("official", short_help="A checkpoint of the official ChEX.")
def official(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Official checkpoint: .pth file, run folder or model folder (chex_stage3)."
        ),
    ],
    output: Output,
    dtype: DtypeOption = Dtype.float32,
    max_shard_size: ShardSize = "2GB",
    clip_tokenizer: ClipTokenizer = None,
    generator_tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|ID",
            help="Sentence tokenizer: folder or Hub id. Default: healx/gpt-2-pubmed-medium, if the Hub cache has it.",
        ),
    ] = None,
    generator_heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Attention heads of the language model, which the checkpoint does not tell. Default: from the "
            "config.json beside its tokenizer, or width / 64, as in every published GPT-2.",
        ),
    ] = None,
    no_tokenizers: NoTokenizers = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint of the official ChEX, of stage 1, 2 or 3, with its tokenizers.

    OUT appears when all is written; after an error nothing is left of it.
    """
    with ErrorReporter(debug).guard("chex convert official", fatal=True):
        from space_app.convert import convert_official

        conversion = convert_official(
            source,
            output,
            dtype=dtype.value,
            max_shard_size=max_shard_size,
            clip_tokenizer=clip_tokenizer,
            generator_tokenizer=generator_tokenizer,
            generator_heads=generator_heads,
            tokenizers=not no_tokenizers,
            overwrite=overwrite,
        )
        print_conversion(conversion)
        if conversion.missing is None:
            typer.echo(f"Next: chex explain scan.png --model {output}")


@convert_app.command("chexzero", short_help="The encoders of CheXzero, to train ChEX from.")
def chexzero(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="State dict of CheXzero, or of another CLIP in OpenAI's format (.pt)."),
    ],
    output: Output,
    dtype: DtypeOption = Dtype.float32,
    max_shard_size: ShardSize = "2GB",
    clip_tokenizer: ClipTokenizer = None,
    no_tokenizers: NoTokenizers = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Convert the encoders of CheXzero, from which the training of ChEX starts."""
    with ErrorReporter(debug).guard("chex convert chexzero", fatal=True):
        from space_app.convert import convert_chexzero

        conversion = convert_chexzero(
            source,
            output,
            dtype=dtype.value,
            max_shard_size=max_shard_size,
            clip_tokenizer=clip_tokenizer,
            tokenizers=not no_tokenizers,
            overwrite=overwrite,
        )
        print_conversion(conversion)
        typer.echo(f"Next: accelerate launch training/stage1.py init_from={output}")


@convert_app.command("chexbert", short_help="CheXbert, which reads findings in reports.")
def chexbert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The published chexbert.pth.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|ID|FILE",
            help="Its tokenizer: folder, Hub id or vocab.txt. Default: bert-base-uncased, if the Hub cache has it.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a CheXbert that is there already.")] = False,
    debug: Debug = False,
) -> None:
    """Convert CheXbert, which reads findings in reports for `chex evaluate`."""
    with ErrorReporter(debug).guard("chex convert chexbert", fatal=True):
        from evaluation.labelers.chexbert_checkpoint import convert_chexbert

        conversion = convert_chexbert(source, output, tokenizer, overwrite)
        typer.echo(
            f"Converted {conversion.checkpoint}: {conversion.num_parameters:,} parameters in {conversion.output}."
        )
        typer.echo(f"Next: chex evaluate --labeler chexbert:{output}")


def print_conversion(conversion: "Conversion") -> None:
    """What was converted, and what the folder lacks."""
    typer.echo(f"Converted {conversion.checkpoint}: {conversion.num_parameters:,} parameters in {conversion.output}.")
    if conversion.generator_heads_guessed is not None:
        typer.echo(
            f"The checkpoint does not tell how many attention heads its language model has; "
            f"{conversion.generator_heads_guessed} are assumed. If that is wrong, add --generator-heads."
        )
    if conversion.missing is not None:
        typer.echo(f"Missing: {conversion.missing}.")
