"""The options that several commands share, so that each reads the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local model directory, smollm2, a Hub id, a .gguf file, a config.json, "
        "or package.module:factory.",
    ),
]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON too; - is stdout."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="For a config.json: go on with random weights.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
OutOfCore = Annotated[
    bool | None,
    typer.Option(
        "--out-of-core/--in-memory",
        help="Read weights from their files when needed, or load them all.  "
        "[default: out of core if they take over a third of the free memory]",
    ),
]
Dequantise = Annotated[
    bool,
    typer.Option(
        "--dequantise", help="Of a GPTQ, AWQ, bitsandbytes or FP8 checkpoint: unpack it first."
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        metavar="PLACE",
        help="Where they wait between two sites: memory, disk, or auto: disk where they would take "
        "a quarter of the free memory.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, auto.")]
DType = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SRC[=WEIGHT]",
        help="Text; rows.jsonl; hub:NAME[:SUBSET[:SPLIT]]; a folder of images; "
        "package.module:loader; or self: text that the model samples. Repeat to mix.  "
        "[default: self]",
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(
        metavar="package.module:function",
        help="What taylor and fisher differentiate: loss(model, inputs), a scalar.  "
        "[default: the model's own]",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration samples: sequences, or images.")]
SeqLen = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens a sample, at most.  [default: 1024, or what the model reads at most]",
    ),
]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
