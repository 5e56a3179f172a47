"""Drive a simulated arm with a bundle, in Python.

    python closed_loop.py BUNDLE [STEPS]

`otau run` does the same with a progress bar, a video and a summary.
"""

from __future__ import annotations

import sys

from otau.robot import open_robot
from otau.runtime import Bundle, Policy


def main(path: str, steps: int = 50) -> None:
    bundle = Bundle.open(path)  # refuses any changed byte
    with Policy.open(bundle) as policy, open_robot("robosuite:Lift") as robot:
        bundle.require(cameras=[camera.name for camera in robot.spec.cameras])
        robot.reset(seed=0)
        done = 0
        while done < steps:
            chunk = policy.infer(robot.observe())
            print(
                f"after {done} steps: a chunk of {len(chunk.actions)} in {sum(chunk.timings.values()):.0f} ms"
            )
            for action in chunk.actions[: steps - done]:
                result = robot.act(action)
                done += 1
                if result.done:
                    print("success" if result.success else "failed")
                    return


if __name__ == "__main__":
    main(sys.argv[1], *(int(argument) for argument in sys.argv[2:]))
