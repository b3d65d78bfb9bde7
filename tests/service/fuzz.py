"""Random requests made from the API's own description, by schemathesis, against a real process of the service.

    python -m tests.service.fuzz --examples 700    # over 5,000 cases, two minutes

No answer is a 5xx, but for the 504 of a deadline that the request set itself and that has passed. Each has a status,
media type, headers and body of the description; what contradicts it is refused, and what a link leads to is there. Not
checked: that whatever fits is accepted. A description cannot say that a deadline must be possible, or that a list of
labels has n entries.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.networks import save_tiny
from tests.service.process import server

T = 20  # so that a request of all steps is short
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 504]  # where the description has no 504, it is still a failure
"""


def fuzz(model: Path, examples: int, seed: int) -> tuple[int, str]:
    """Cases that were tried, and what schemathesis said.

    Args:
        model: is served.
        examples: of random requests to each operation, and of sequences.
        seed: of them.
    """
    with server(model=model, max_images=4) as it, tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "schemathesis.toml")
        config.write_text(CONFIG)
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config), "run",
                f"{it.url}/openapi.json", "--max-examples", str(examples), "--seed", str(seed), "--continue-on-failure",
                "--exclude-checks", "positive_data_acceptance", "--warnings", "off", "--request-timeout", "60",
                "--generation-database", "none",
            ],
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        alive = it.get("/health").json()
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert alive["status"] == "ok"
    assert alive["engine"]["slots_running"] == alive["engine"]["slots_waiting"] == 0
    cases = re.search(r"(\d[\d,]*) generated", said)
    assert cases is not None, said
    return int(cases[1].replace(",", "")), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases, said = fuzz(save_tiny(Path(folder) / "tiny", num_train_timesteps=T), arguments.examples, arguments.seed)
    print(said)
    print(f"{cases} cases, no failure")


if __name__ == "__main__":
    main()
