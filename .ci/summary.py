"""Prints how long every session took and how it ended, from nox's reports; exits with 1 if one failed."""

import json
import sys
from pathlib import Path

EXPECTED = 6  # reports; one that is missing means that nox itself failed


def main() -> int:
    """Read the reports in the folder named on the command line."""
    reports = [json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.json"))]
    sessions = [session for report in reports for session in report["sessions"]]
    for session in sessions:
        print(f"{session['duration']:8.1f} s  {session['result']:8} {session['signatures'][0]}")
    print(f"{sum(session['duration'] for session in sessions):8.1f} s  all sessions")
    results = [session["result"] for session in sessions]
    num_passed, num_skipped = results.count("success"), results.count("skipped")
    num_failed = len(results) - num_passed - num_skipped + EXPECTED - len(reports)
    print(f"sessions: {num_passed} passed, {num_failed} failed, {num_skipped} skipped")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
