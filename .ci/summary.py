"""Prints how long every session took and how it ended, from nox's reports; exits with 1 if one failed."""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Read the reports in the folder named on the command line, as many as the number after it says."""
    reports = [json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.json"))]
    num_missing = int(sys.argv[2]) - len(reports)  # nox itself failed
    sessions: dict[str, dict[str, Any]] = {}
    for session in (session for report in reports for session in report["sessions"]):
        # One that others need is in the reports of them all, where it found everything done.
        known = sessions.setdefault(session["signatures"][0], session)
        if known["result"] == "success" and (session["result"] != "success" or session["duration"] > known["duration"]):
            sessions[session["signatures"][0]] = session
    for name, session in sorted(sessions.items(), key=lambda item: -item[1]["duration"]):
        print(f"{session['duration']:8.1f} s  {session['result']:8} {name}")
    print(f"{sum(session['duration'] for session in sessions.values()):8.1f} s  all sessions")
    results = [session["result"] for session in sessions.values()]
    num_passed, num_skipped = results.count("success"), results.count("skipped")
    num_failed = len(results) - num_passed - num_skipped + num_missing
    print(f"sessions: {num_passed} passed, {num_failed} failed, {num_skipped} skipped")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
