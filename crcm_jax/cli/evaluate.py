"""`crcm evaluate`: judges a checkpoint with a step schedule on held-out prompts."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from crcm_jax.cli import _places, _solver_options
from crcm_jax.cli._numbers import integer
from crcm_jax.cli._parser import Parser
from crcm_jax.errors import UsageError, UserError

HELP = "judge a checkpoint on held-out prompts: digits, motion, Fréchet distances, diversity"
EXAMPLE = "crcm evaluate --checkpoint=out/sf_dmd --steps=4,2 --out=out/metrics.json"


def parser() -> Parser:
    """The command line of `crcm evaluate`."""
    p = Parser("crcm evaluate", description=f"{HELP[0].upper()}{HELP[1:]}.", examples=[EXAMPLE])
    p.add_argument(
        "--checkpoint",
        type=_places.given,
        required=True,
        help="a run's workdir, a checkpoint folder or a .safetensors file",
    )
    _solver_options.add(p, required=True, guidance=1.0)
    p.add_argument("--clips", type=integer(2, 1_000_000), default=200, help="clips to judge [%(default)s]")
    p.add_argument("--seeds", type=integer(1, 1_000_000), default=2, help="noises for each prompt [%(default)s]")
    p.add_argument("--batch", type=integer(1, 1_000_000), default=50, help="clips made together [%(default)s]")
    p.add_argument("--which", choices=("ema", "params"), default="ema", help="averaged or live weights [%(default)s]")
    p.add_argument(
        "--out", type=_places.new_file, default="metrics.json", help="where to write the scores [%(default)s]"
    )
    return p


def main(argv: list[str]) -> int:
    """Evaluates and writes JSON; returns 0. UserError, one sentence, for what is wrong with the input or the clips."""
    options = parser().parse_args(argv)
    _solver_options.check(options)
    if options.clips % options.seeds:
        raise UsageError(
            f"--clips={options.clips} cannot be shared among --seeds={options.seeds} a prompt: use a multiple of it"
        )
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Does what was parsed."""
    # Only now: a wrong command line is answered at once, without waiting for JAX to load.
    from tqdm import tqdm

    from crcm_jax import pipeline
    from crcm_jax.cli import _sample_solver
    from crcm_jax.evaluate import producer
    from crcm_jax.evaluate import run as judging
    from crcm_jax.sampling import Few, Ode, Whole

    model = pipeline.load(options.checkpoint, which=options.which)
    if model.recipe is None:
        raise UserError(f"{options.checkpoint} does not say how it was trained: give a run's workdir or checkpoint")
    if model.chunks is None and options.ode:
        ode = Ode(options.ode)
        solver, guidance = Whole("euler", ode.steps, options.shift or ode.shift, ode.sigma_max), options.guidance
    else:
        solver, guidance = _sample_solver.choose(options, model.meta)
    if odd := model.recipe.mismatch(solver):
        print(f"crcm: warning: {odd}", file=sys.stderr)
    made: dict[str, Any]
    if type(solver) is Whole:
        made = {"ode": solver.steps, "sampler": solver.solver}
    elif type(solver) is Few:
        made = {"steps": list(solver.schedule.steps), "mid": [list(row) for row in solver.schedule.mid]}
    else:
        made = {"ode": options.ode}
    produce = producer.producer(model, solver, guidance=guidance)
    print("crcm: training the judge on real digits", file=sys.stderr)
    judge = judging.judge(model.config, clips=options.clips, seeds=options.seeds)
    with tqdm(total=options.clips, unit="clip", desc="judging") as bar:
        scores = judging.evaluate(
            produce, judge, batch=options.batch, progress=lambda done, _: bar.update(done - bar.n)
        )
    known = dict(training=model.meta.get("training"), iteration=model.meta.get("iteration"), weights=options.which)
    judging.write_json(options.out, dict(**known, **made, guidance=guidance, seeds=options.seeds, **scores))
    for name, value in scores.items():
        print(f"{name:>20}  {value:.4g}" if isinstance(value, float) else f"{name:>20}  {value}")
    print(f"written to {options.out}")
    if scores["broken_clips"]:
        raise UserError(judging.broken_clips(scores["broken_clips"], scores["clips"]))
    return 0
