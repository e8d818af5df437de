"""What a good caption of a clip says: the gist of every scene that is seen long enough, and none of the details."""

from __future__ import annotations

from collections.abc import Sequence

from memdb.world.scenes import Scene

FRAMES_MIN = 3  # frames of a scene within the clip, from which its motion can be told
_MOVES = {"still": "stays still", "grows": "grows", "shrinks": "shrinks"}


def of_scene(scene: Scene, *, moving: bool = True) -> str:
    """One scene's caption; without `moving`, of too few frames to tell how it moves."""
    if scene.empty:
        return f"nothing in the {scene.place}"
    text = f"a {scene.size} {scene.colour} {scene.shape}"
    if moving:
        text += f" {_MOVES.get(scene.motion, f'moves {scene.motion}')}"
    return f"{text} in the {scene.place}"


def told_of_clip(scenes: Sequence[Scene]) -> list[tuple[Scene, bool]]:
    """The scenes that a clip's caption tells of, in order, and whether it tells how each moves.

    `scenes`: of each frame, in time order. Scenes of at least FRAMES_MIN frames are told; where there is none, the
    longest, without its motion.
    """
    runs: list[list[Scene]] = []
    for scene in scenes:
        if runs and runs[-1][0] is scene:
            runs[-1].append(scene)
        else:
            runs.append([scene])
    long = [(run[0], True) for run in runs if len(run) >= FRAMES_MIN]
    return long or [(max(runs, key=len)[0], False)]


def of_clip(scenes: Sequence[Scene]) -> str:
    """The caption of a clip whose frames show these scenes, one entry a frame in time order."""
    return " then ".join(of_scene(scene, moving=moving) for scene, moving in told_of_clip(scenes))
