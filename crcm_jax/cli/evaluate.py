"""`crcm evaluate`: judges a checkpoint with a step schedule on held-out prompts."""

from __future__ import annotations

import argparse
import sys

from crcm_jax.cli import _places
from crcm_jax.cli._numbers import integer, number, several, times
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
    solver = p.add_mutually_exclusive_group(required=True)
    solver.add_argument(
        "--steps",
        type=several(integer(1, 10_000), example="4,2"),
        help="a student's steps for each chunk, the last for all others",
    )
    solver.add_argument("--ode", type=integer(1, 10_000), metavar="N", help="a diffusion model's Euler steps")
    p.add_argument(
        "--mid", type=times, help="times between 1 and 0 where a student stops; chunks apart by ';' [the run's own]"
    )
    p.add_argument(
        "--guidance",
        type=number(at_least=0, at_most=1000),
        default=1.0,
        help="guidance of a diffusion model [%(default)s]",
    )
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
    if options.mid is not None and options.steps is None:
        raise UsageError("--mid belongs to --steps: a diffusion model's times follow from --ode")
    if options.clips % options.seeds:
        raise UsageError(
            f"--clips={options.clips} cannot be shared among --seeds={options.seeds} a prompt: use a multiple of it"
        )
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Does what was parsed."""
    # Only now: a wrong command line is answered at once, without waiting for JAX to load.
    from tqdm import tqdm

    from crcm_jax import recipes
    from crcm_jax.evaluate import producer
    from crcm_jax.evaluate import run as judging
    from crcm_jax.sampling import Ode, Whole

    config, params, meta = producer.load(options.checkpoint, options.which, causal=options.ode is None)
    if options.steps:
        solver = producer.few_step_solver(config, options.steps, options.mid)
        made = dict(steps=list(options.steps), mid=[list(row) for row in solver.schedule.mid])
    else:
        ode = Ode(options.ode)
        solver = ode if recipes.of(config).causal else Whole("euler", ode.steps, ode.shift, ode.sigma_max)
        made = dict(ode=options.ode)
    produce = producer.producer(config, params, solver, guidance=options.guidance)
    print("crcm: training the judge on real digits", file=sys.stderr)
    judge = judging.judge(config, clips=options.clips, seeds=options.seeds)
    with tqdm(total=options.clips, unit="clip", desc="judging") as bar:
        scores = judging.evaluate(
            produce, judge, batch=options.batch, progress=lambda done, _: bar.update(done - bar.n)
        )
    known = dict(training=meta.get("training"), iteration=meta.get("iteration"), weights=options.which)
    judging.write_json(options.out, dict(**known, **made, guidance=options.guidance, seeds=options.seeds, **scores))
    for name, value in scores.items():
        print(f"{name:>20}  {value:.4g}" if isinstance(value, float) else f"{name:>20}  {value}")
    print(f"written to {options.out}")
    if scores["broken_clips"]:
        raise UserError(judging.broken_clips(scores["broken_clips"], scores["clips"]))
    return 0
