"""``python -m benchmark.model_start FOLDER DTYPE BEGAN``: one start of a process, from nothing to the first token, as JSON.

BEGAN is `time.time()` of who starts it, so that the interpreter's own start counts. Seconds of each part are printed, and
bytes of memory that the process then holds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(folder: Path, dtype: str, began: float) -> dict[str, float]:
    """Import, load and make a token; `folder` is ours where its config.json says so, and else a dense one."""
    clock, seconds = [began], {}

    def lap(name: str) -> None:
        now = time.time()
        seconds[name] = now - clock[0]
        clock[0] = now

    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])  # which imports what every model needs, half of it torch's
    transformers.utils.logging.disable_progress_bar()
    lap("torch and transformers")
    import bitblas

    lap("import bitblas")
    if "quantization_config" in config:
        model = bitblas.load_model(folder, dtype=getattr(torch, dtype), device="cpu")
    else:
        model = kind.from_pretrained(folder, dtype=getattr(torch, dtype))
    lap("load")
    with torch.inference_mode():
        model(torch.arange(16)[None], logits_to_keep=1).logits.argmax()
    lap("first token")
    seconds["in all"] = clock[0] - began
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = {name: int(status[field].split()[0]) * 1024 for name, field in FIELDS.items()}
    read = time.time()
    for path in folder.glob("*.safetensors"):
        path.read_bytes()
    seconds["reading the weights"] = time.time() - read
    return {**seconds, **memory}


#: Of /proc/self/status, in bytes: what is in memory, that part of it which is mapped files, and the most there ever was.
FIELDS = {"resident": "VmRSS", "of files": "RssFile", "peak": "VmHWM"}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))))
