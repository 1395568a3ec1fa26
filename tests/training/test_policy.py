"""DiffusionPolicy on the three layouts: SD3 (batched, flow), Flux (packed, two calls for true CFG), SD (UNet, DDIM)."""

import pytest
import torch

from diffgen.pipelines import CFG
from diffgen.tiny import call_kwargs, tiny_pipeline
from diffgen.training.config import Lora
from diffgen.training.policy import DiffusionPolicy, swapped

NAMES = ["StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionPipeline"]
PROMPTS = ["a red circle"] * 3 + ["two large blue squares left of a cross"] * 3
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
SEEDS = [(7, 0, g, i % 3) for i, g in enumerate(GROUP.tolist())]
STEPS = 4
ALL, ACTIONS = torch.arange(6), torch.arange(STEPS - 1)


def perturb(policy, size=0.1, seed=0):
    """Moves the trainable weights, so that LoRA (zero at first) says something."""
    generator = torch.Generator().manual_seed(seed)
    for p in policy.named_parameters().values():
        p.data += size * torch.randn(p.shape, generator=generator)


def build(name, lora=True, moved=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = DiffusionPolicy(
            tiny_pipeline(name), lora=Lora(rank=4, alpha=6) if lora else None, call=call_kwargs(name)
        )
    if moved:
        perturb(policy, 0.1 if lora else 0.01)
    return policy


def roll(policy, order=None, **options):
    order = ALL if order is None else order
    return policy.rollout(
        [PROMPTS[i] for i in order],
        GROUP[order],
        [SEEDS[i] for i in order],
        **{"num_inference_steps": STEPS, **options},
    )


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("guidance", [None, CFG(3.0)], ids=["plain", "cfg"])
def test_right_after_the_rollout_every_ratio_is_exactly_one(name, guidance, lora):
    policy = build(name, lora)
    rollout = roll(policy, guidance=guidance)
    assert rollout.logp.shape == (6, STEPS - 1)
    assert rollout.logp.dtype == torch.float32
    assert rollout.samples.dtype == torch.uint8
    assert rollout.samples.shape == (6, 3, 16, 16)
    evaluation = policy.evaluate(rollout, ALL, ACTIONS, grad_uncond=True)
    assert evaluation.logp.requires_grad
    assert torch.equal(evaluation.logp.detach(), rollout.logp)
    perturb(policy, 0.01, seed=1)
    assert (policy.evaluate(rollout, ALL, ACTIONS).logp - rollout.logp).abs().max() > 1e-4


def test_without_gradients_through_the_unconditional_branch_values_stay(name):
    policy = build(name)
    rollout = roll(policy, guidance=CFG(3.0))
    both = policy.evaluate(rollout, ALL, ACTIONS, grad_uncond=True)
    one = policy.evaluate(rollout, ALL, ACTIONS, grad_uncond=False)
    torch.testing.assert_close(one.logp, both.logp, atol=1e-5, rtol=0)
    params = list(policy.named_parameters().values())
    a, b = (torch.autograd.grad(e.logp.sum(), params) for e in (both, one))
    assert max((x - y).abs().max() / x.abs().max().clamp_min(1e-9) for x, y in zip(a, b)) > 0.05


@pytest.mark.parametrize("batch_size", [6, 4])
def test_any_rows_in_any_order_get_their_own_log_probs(name, batch_size):
    policy = build(name)
    rollout = roll(policy, guidance=CFG(3.0), batch_size=batch_size)
    for rows in ([5, 0, 3, 1, 4, 2], [4], [2, 5], [3, 2]):
        rows = torch.tensor(rows)
        for actions in (ACTIONS, torch.tensor([2, 0])):
            evaluation = policy.evaluate(rollout, rows, actions, grad_uncond=True, reference=True)
            torch.testing.assert_close(evaluation.logp, rollout.logp[rows][:, actions], atol=1e-5, rtol=0)
            assert [len(s.mean) for s in evaluation.steps + evaluation.reference] == 2 * len(actions) * [len(rows)]
    assert (rollout.logp[:, None] - rollout.logp).abs().sum(-1).fill_diagonal_(1).min() > 1e-4  # rows do differ


def test_evaluated_steps_stand_in_the_order_of_the_rows_asked_for(name):
    policy = build(name)
    rollout = roll(policy, batch_size=4)
    means = policy.evaluate(rollout, ALL, ACTIONS, reference=True)
    rows = torch.tensor([5, 1, 4, 0])
    some = policy.evaluate(rollout, rows, ACTIONS, reference=True)
    for whole, part in [(means.steps, some.steps), (means.reference, some.reference)]:
        for a, b in zip(whole, part):
            torch.testing.assert_close(a.mean[rows], b.mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_gradients_reach_every_trainable_parameter_and_no_other(name, lora):
    policy = build(name, lora)
    rollout = roll(policy)
    policy.evaluate(rollout, ALL, ACTIONS).logp.sum().backward()
    params = policy.named_parameters()
    assert params
    assert all(("lora" in key) == lora for key in params)
    silent = [key for key, p in params.items() if p.grad is None or not p.grad.any()]
    # SD3's last block makes no text output, so its text queries lead nowhere
    assert [
        key for key in silent if "blocks.1.attn.add_q_proj" not in key and "blocks.1.attn.norm_added_q" not in key
    ] == []
    trained = {id(p) for p in params.values()}
    for module in policy.pipe.components.values():
        if isinstance(module, torch.nn.Module):
            assert all(p.grad is None for p in module.parameters() if id(p) not in trained)


def test_without_the_adapter_the_denoiser_is_the_base_bit_for_bit(name):
    base = DiffusionPolicy(tiny_pipeline(name), lora=None, call=call_kwargs(name))
    policy = build(name)
    rollout = roll(policy)
    expected = base.sample(PROMPTS, SEEDS, num_inference_steps=2)
    with policy.reference():
        assert torch.equal(policy.sample(PROMPTS, SEEDS, num_inference_steps=2), expected)
        recorded = rollout.replay[0].recorded[1]
        with_base = base.modules[next(iter(base.modules))](**recorded.cond.kwargs)[0]
        assert torch.equal(recorded.replay(), with_base)
    assert not torch.equal(recorded.replay(), with_base)


def test_a_fresh_adapter_changes_nothing(name):
    base = DiffusionPolicy(tiny_pipeline(name), lora=None, call=call_kwargs(name))
    policy = build(name, moved=False)
    a, b = (p.sample(PROMPTS, SEEDS, num_inference_steps=2) for p in (base, policy))
    assert torch.equal(a, b)
    evaluation = policy.evaluate(roll(policy), ALL, ACTIONS, reference=True)
    assert all(torch.equal(s.mean, r.mean) for s, r in zip(evaluation.steps, evaluation.reference))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_after_the_reference_block_the_weights_are_exactly_the_trained_ones(name, lora):
    policy = build(name, lora, moved=False)
    policy.keep_reference()
    perturb(policy, 0.05)
    rollout = roll(policy)
    before = {k: p.detach().clone() for k, p in policy.named_parameters().items()}
    outputs = policy.evaluate(rollout, ALL, ACTIONS, reference=True)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert all(torch.equal(p, before[k]) for k, p in policy.named_parameters().items())
    assert torch.equal(policy.evaluate(rollout, ALL, ACTIONS).logp, outputs.logp)
    assert torch.equal(outputs.logp.detach(), rollout.logp)
    assert all((s.mean - r.mean).abs().max() > 1e-3 for s, r in zip(outputs.steps, outputs.reference))
    fresh = build(name, lora, moved=False)
    for i, step in enumerate(outputs.reference):
        expected = fresh.evaluate(_with_modules_of(rollout, fresh), ALL, torch.tensor([i])).steps[0].mean
        torch.testing.assert_close(step.mean, expected, atol=0, rtol=0)


def _with_modules_of(rollout, policy):
    """The same recorded inputs, to be predicted by another policy."""
    from dataclasses import replace

    (module,) = policy.modules.values()
    chunks = []
    for chunk in rollout.replay:
        recorded = [replace(r, cond=replace(r.cond, module=module)) for r in chunk.recorded]
        chunks.append(replace(chunk, recorded=recorded))
    return replace(rollout, replay=chunks)


def test_full_fine_tuning_needs_its_reference_kept_first():
    with pytest.raises(RuntimeError, match="keep_reference"), build(NAMES[0], lora=False).reference():
        pass


def test_swapped_weights_come_back_even_after_an_error():
    params = [torch.nn.Parameter(torch.rand(3)) for _ in range(2)]
    before, other = [p.detach().clone() for p in params], [torch.zeros(3), torch.ones(3)]
    seen = []

    def inside():
        with swapped(params, other):
            seen.append(params[1].detach().clone())
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert torch.equal(seen[0], torch.ones(3))
    assert all(torch.equal(p, b) for p, b in zip(params, before))
    assert torch.equal(other[0], torch.zeros(3))


# --- noise and sharing ----------------------------------------------------------------------------------------------


def latents(rollout, step):
    """x before a trained action, [B, ...]."""
    return torch.cat([chunk.transitions[step].x for chunk in rollout.replay])


def test_a_group_that_shares_its_initial_noise_is_one_sample_until_the_window(name):
    policy = build(name)
    rollout = roll(policy, window=(2, 4), share_initial_noise=True, guidance=CFG(3.0))
    assert rollout.logp.shape == (6, 2)
    x, after = latents(rollout, 0), latents(rollout, 1)
    for first in (0, 3):
        assert torch.equal(x[first], x[first + 1])
        assert torch.equal(x[first], x[first + 2])
        assert (after[first] - after[first + 1]).abs().max() > 1e-3
    assert (x[0] - x[3]).abs().max() > 1e-2
    independent = latents(roll(policy, window=(2, 4), guidance=CFG(3.0)), 0)
    assert (independent[0] - independent[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("guidance", "branches"), [(None, 1), (CFG(3.0), 2)], ids=["plain", "cfg"])
def test_what_a_group_shares_is_evaluated_once(name, guidance, branches):
    """Steps 0 and 1 and the window's first step 2 have one input a group: 2 rows each instead of 6; step 3 has 6."""
    policy = build(name)
    rows = []
    (module,) = policy.modules.values()
    first = {
        "SD3Transformer2DModel": "pos_embed",
        "FluxTransformer2DModel": "x_embedder",
        "UNet2DConditionModel": "conv_in",
    }
    layer = getattr(module, first[type(module).__name__])
    count = layer.register_forward_hook(lambda m, arguments, out: rows.append(len(out)))
    shared = roll(policy, window=(2, 4), share_initial_noise=True, guidance=guidance)
    assert sum(rows) == branches * (3 * 2 + 6)
    rows.clear()
    roll(policy, window=(2, 4), guidance=guidance)
    assert sum(rows) == branches * 4 * 6
    count.remove()
    evaluation = policy.evaluate(shared, ALL, torch.arange(2), grad_uncond=True)
    torch.testing.assert_close(evaluation.logp, shared.logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_the_same_seeds_give_the_same_rollout_whatever_the_batch_size_and_order(name, shared):
    policy = build(name)
    options = {"window": (1, 3), "share_initial_noise": shared, "guidance": CFG(2.0)}
    whole = roll(policy, **options)
    parts = roll(policy, batch_size=4, **options)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    other = roll(policy, order, **options)
    for step in range(2):
        for a, b in [(latents(whole, step), latents(parts, step)), (latents(whole, step)[order], latents(other, step))]:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.logp, parts.logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.logp[order], other.logp, atol=1e-5, rtol=0)
    assert (whole.samples[order].int() - other.samples.int()).abs().max() <= 1
    assert other.prompts == [PROMPTS[i] for i in order]


def noises(rollout, policy):
    """The standard normal draws of each trained step, recovered from the recorded transitions [B, T, ...]."""
    found = []
    for t, r in zip(rollout.replay[0].transitions, rollout.replay[0].recorded):
        step = t.remake(r.replay())
        found.append((t.x_next - step.mean) / step.std)
    return torch.stack(found, 1).detach()


def test_noise_depends_on_seed_update_group_and_sample_only(name):
    """Not on the weights, nor on who else is in the batch."""
    policy = build(name)
    all_noise = noises(roll(policy), policy)
    perturb(policy, 0.05, seed=3)
    again = noises(roll(policy, torch.tensor([4, 1])), policy)
    torch.testing.assert_close(again, all_noise[[4, 1]], atol=1e-4, rtol=0)
    flat = all_noise.flatten(0, 1).flatten(1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.5  # each sample and step has its own
    assert abs(flat.std() - 1) < 0.1
    changed = policy.rollout(["a red circle"], GROUP[:1], [(7, 1, 0, 0)], num_inference_steps=STEPS)
    assert (noises(changed, policy)[0] - all_noise[0]).abs().max() > 1


def test_a_rollout_leaves_the_pipeline_and_the_global_generator_as_they_were(name):
    policy = build(name)
    scheduler, state = policy.pipe.scheduler, torch.random.get_rng_state()
    roll(policy)
    assert policy.pipe.scheduler is scheduler
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ZeroDivisionError):
        roll(policy, guidance=_Broken())
    assert policy.pipe.scheduler is scheduler
    roll(policy)


class _Broken(CFG):
    def __init__(self):
        super().__init__(3.0)

    def __call__(self, cond, uncond, step):
        raise ZeroDivisionError


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"hieght": 16}, r"rollout.call.hieght: StableDiffusion3Pipeline has no such argument; did you mean 'height'"),
        ({"guidance_scale": 3.0}, r"rollout.call.guidance_scale: set by the trainer"),
        ({"output_type": "pil"}, r"rollout.call.output_type: set by the trainer"),
        ({"num_images_per_prompt": 2}, r"rollout.call.num_images_per_prompt: set by the trainer"),
    ],
)
def test_a_wrong_call_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        DiffusionPolicy(tiny_pipeline(NAMES[0]), lora=Lora(), call=call)


def test_target_modules_that_match_nothing_are_named_with_the_nearest_layer():
    with pytest.raises(
        ValueError, match=r"lora.target_modules: none of \['to_kk'\] .* transformer; did you mean 'to_k'"
    ):
        DiffusionPolicy(tiny_pipeline(NAMES[0]), lora=Lora(target_modules=["to_kk"]))


def test_a_pipeline_without_lora_loading_says_so_before_training():
    with pytest.raises(ValueError, match="lora: PixArtSigmaPipeline can't load or save LoRA weights; `lora: null`"):
        DiffusionPolicy(tiny_pipeline("PixArtSigmaPipeline"), lora=Lora())
