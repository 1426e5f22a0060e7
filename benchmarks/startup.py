"""`demo/ask.py` in a fresh process: seconds to the first text on stdout, and peak memory.

    python benchmarks/startup.py [--rounds 5] [--model FOLDER] [--imports]

The clock runs from the start of the process to the first byte it writes, so the interpreter, every import, the weights, the
picture, the gate and the prompt are in it. The answer is one token long: the gate holds a longer one back until it has read
enough of it. One start warms the page cache and is not counted: a second start is what is measured. One JSON object on
stdout; progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
ASK = REPOSITORY / "demo" / "ask.py"

# In a process of its own: memory that this one had taken would be counted as that of the processes it starts.
MAKE_MODEL = """
import sys
from transformers.utils import logging
from mmgpt.config import ModelConfig
from mmgpt.model.multimodal import MultimodalGPT
logging.disable_progress_bar()
MultimodalGPT.from_config(ModelConfig()).save_pretrained(sys.argv[1], full=False)
"""
MAKE_PICTURE = """
import sys
from PIL import Image
Image.radial_gradient("L").resize((640, 480)).convert("RGB").save(sys.argv[1])
"""


def start(command: list[str], log: Path) -> dict[str, float]:
    """Run a command; seconds to its first byte on stdout (to its end where it writes none) and its peak memory."""
    with open(log, "w", encoding="utf-8") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert process.stdout is not None
        output = os.read(process.stdout.fileno(), 1)
        first = time.perf_counter() - began
        output += process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        whole = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{log.read_text(encoding='utf-8')[-2000:]}")
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    return {"first_text": first, "whole": whole, "peak_memory_mb": peak, "cpu": usage.ru_utime + usage.ru_stime}


def imports(log: Path) -> dict[str, Any]:
    """What `-X importtime` wrote: the slowest imports with all that they import, and seconds by package without."""
    line = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| +(\S+)$")
    rows = [match.groups() for text in log.read_text(encoding="utf-8").splitlines() if (match := line.match(text))]
    packages: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for own, _, name in rows:
        packages[name.partition(".")[0]] += int(own)
        modules[name.partition(".")[0]] += 1
    slowest = sorted(rows, key=lambda row: -int(row[1]))[:15]
    return {
        "modules": len(rows),
        "seconds": round(sum(packages.values()) / 1e6, 2),
        "slowest": {name: round(int(total) / 1e6, 2) for _, total, name in slowest},
        "packages": {name: [round(own / 1e6, 2), modules[name]] for name, own in packages.most_common(15)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="a run or an exported model; default: the newest run, else an untrained model")
    parser.add_argument("--image", help="a picture; default: one that is drawn")
    parser.add_argument("--question", default="What is this?")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--tokens", type=int, default=1, help="longest answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--imports", action="store_true", help="add the 15 slowest imports and packages")
    options = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    from demo.runs import newest_run

    with tempfile.TemporaryDirectory(prefix="mmgpt-startup-") as temporary:
        folder = Path(temporary)
        model = options.model or newest_run([Path("runs"), REPOSITORY / "runs"])
        if model is None:
            model = folder / "model"
            print("no run found: an untrained model is built", file=sys.stderr, flush=True)
            subprocess.run([sys.executable, "-c", MAKE_MODEL, str(model)], check=True, cwd=REPOSITORY)
        picture = options.image or folder / "picture.png"
        if options.image is None:
            subprocess.run([sys.executable, "-c", MAKE_PICTURE, str(picture)], check=True)
        arguments = [str(ASK), "--model", str(model), "--image", str(picture), "--max_new_tokens", str(options.tokens)]
        arguments += ["--precision", options.precision, options.question]
        log = folder / "errors.log"
        found: list[dict[str, float]] = []
        for turn in range(options.rounds + 1):
            found.append(start([sys.executable, *arguments], log))
            print(f"start {turn}: {', '.join(f'{k} {v:.2f}' for k, v in found[-1].items())}", file=sys.stderr, flush=True)
        rounds = found[1:] or found
        report: dict[str, Any] = {
            "model": "untrained" if model == folder / "model" else str(model),
            "seconds_to_first_text": spread([row["first_text"] for row in rounds], 2),
            "seconds_first_start": round(found[0]["first_text"], 2),
            "seconds_cpu": spread([row["cpu"] for row in rounds], 2),
            "peak_memory_mb": spread([row["peak_memory_mb"] for row in rounds], 0),
            "rounds": len(rounds),
        }
        if options.imports:
            start([sys.executable, "-X", "importtime", *arguments], log)
            report["imports"] = imports(log)
    print(json.dumps(report, indent=2))


def spread(values: list[float], digits: int) -> dict[str, float]:
    return {"best": round(min(values), digits), "median": round(statistics.median(values), digits)}


if __name__ == "__main__":
    main()
