"""Tests that `make test-fast` leaves out: those that take seconds each, measured one by one.

An entry is a folder, a file or a test below this folder. What compiles whole networks, starts other processes, or
compares many cases of a kernel is here; one test of most things is left.
"""

SLOW = (
    "cli/test_data.py",
    "cli/test_fuzz.py",
    "cli/test_interrupts.py",
    "cli/test_sample.py",
    "cli/test_sample_mesh.py",
    "convert/test_convert_round_trip.py",
    "data/test_latents.py::test_resumes_at_the_exact_example",
    "data/test_pipeline.py::test_processes_give_the_same_batches_and_resume",
    "data/test_reader_fuzz.py",
    "evaluate/test_producer.py::test_clips_depend_on_prompt_seed_steps_and_nothing_else",
    "evaluate/test_run.py",
    "models/test_bound.py",
    "models/test_wan_inference.py",
    "models/test_wan_parity.py",
    "models/test_wan_remat.py",
    "models/test_wan_transformer.py",
    "models/test_wan_transformer_tangent.py",
    "models/wan_text",
    "models/wan_vae",
    "objectives/test_details.py::test_one_pass_is_two_passes",
    "objectives/test_details.py::test_the_context_receives_gradients",
    "objectives/test_given_frames.py",
    "objectives/test_minimisers.py",
    "package/test_wheel.py",
    "pallas_kernels/test_attention_mosaic_gpu.py",
    "pallas_kernels/test_attention_numerics.py",
    "pallas_kernels/test_attention_transforms.py",
    "pallas_kernels/test_mosaic_tpu.py",
    "pallas_kernels/test_mosaic_tpu_compile.py",
    "parallel/test_aot.py",
    "parallel/test_mesh.py",
    "parallel/test_placement_attention.py",
    "recipes/test_protocol.py",
    "recipes/test_recipes.py",
    "recipes/test_walk.py::test_a_recipe_from_its_config_to_a_clip",
    "recipes/test_walk.py::test_weights_of_another_recipe_are_refused",
    "sampling",
    "saving/test_atomic.py",
    "test_demo.py",
    "test_docs_code.py::test_the_code_runs",
    "test_rollout.py::test_a_rollout_gathers_every_matrix_once",
    "test_rollout.py::test_replaying_is_differentiating",
    "train/test_old_checkpoints.py",
    "train/test_processes.py",
    "train/test_train_assemble.py",
    "train/test_train_bench.py",
    "train/test_train_latents.py",
    "train/test_train_run.py",
    "train/test_train_step.py",
)


def is_slow(name: str) -> bool:
    """Whether the test of that name, such as `data/test_latents.py::test_it[case]`, is one of them."""
    return any(name == entry or name.startswith((f"{entry}/", f"{entry}::", f"{entry}[")) for entry in SLOW)
