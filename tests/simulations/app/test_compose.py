"""Composition by Hydra, whose state is one for the whole process."""

from concurrent.futures import ThreadPoolExecutor

from omegaconf import OmegaConf

from simulations.app.compose import load


def test_threads_compose_what_each_would_alone():
    """A sweep that runs its cases in threads composes in them; Hydra refuses a second beginning."""
    words = [
        (f"strategy={s}", f"seed={i}") for i, s in enumerate(("fedit", "ffa", "flora", "slora"))
    ]

    def composed(one):
        return OmegaConf.to_container(load(one), resolve=True)

    with ThreadPoolExecutor(len(words)) as pool:
        together = list(pool.map(composed, words))
    assert together == [composed(one) for one in words]
