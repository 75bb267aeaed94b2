"""The frozen denoiser: exactness of its shortcuts, noise and targets in fp32, what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel

from dcr_mllm.errors import UserError
from stage1_dcr.denoiser import Denoiser, encode_empty_prompt
from stage1_dcr.objective import dcr_loss
from tests.stage1_dcr.dense import dense_dcr_loss, plain_unet
from tests.tiny_models import clip_tokenizer, save_tiny_denoiser

WIDTH = 24
CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
PLAIN = "DownBlock2D", "UpBlock2D"

# How Stable Diffusion 1.x and 2.x differ (width of the heads, linear or convolutional projections), the layouts that
# the shortcuts have to know apart, and sizes that the UNet cannot halve evenly.
STYLES = {
    "sd1": {"attention_head_dim": 8},
    "sd2": {"attention_head_dim": (1, 2, 4), "use_linear_projection": True, "upcast_attention": True},
    "only_cross": {"attention_head_dim": 2, "only_cross_attention": (True, True, False)},
    "deep": {"attention_head_dim": 2, "transformer_layers_per_block": 2, "layers_per_block": 2},
    "plain_first": {"attention_head_dim": 2, "blocks": (PLAIN, CROSS, PLAIN)},
    "no_mid_block": {"attention_head_dim": 2, "mid_block_type": None},
    "scale_shift": {"attention_head_dim": 2, "resnet_time_scale_shift": "scale_shift"},
}
# What the derivation does not hold for: has to be noticed, and go the plain way.
NOT_COVERED = {
    "gated": {"attention_head_dim": 2, "attention_type": "gated"},
    "normed": {
        "attention_head_dim": 2,
        "blocks": (("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"), CROSS, PLAIN),
    },
    "encoder_projection": {"attention_head_dim": 2, "encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj"},
}


def tiny_unet(blocks=(CROSS, CROSS, PLAIN), seed=0, **options) -> UNet2DConditionModel:
    down, up = zip(*blocks, strict=True)
    options = {
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    } | options
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=down,
        up_block_types=up[::-1],
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        **options,
    )
    with torch.no_grad():  # library initialisation leaves biases at zero: a mistake in them would go unseen
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(1.5)
    return unet


def tiny_vae(**options) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, **options)  # fmt: skip


def make(unet=None, prediction_type="epsilon", dtype=torch.float32, **vae_options) -> Denoiser:
    unet = tiny_unet(attention_head_dim=2) if unet is None else unet
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    torch.manual_seed(7)
    prompt = torch.randn(77, WIDTH)
    vae = tiny_vae(**vae_options)
    return Denoiser(vae, unet.to(dtype), schedule.alphas_cumprod, prompt, prediction_type=prediction_type)


def inputs(rows=2, n=3, size=8, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 4, size, size, generator=generator).to(dtype)
    timesteps = torch.randint(0, 1000, (rows,), generator=generator)
    conditions = torch.randn(rows, n, WIDTH, generator=generator).to(dtype)
    return latents, timesteps, conditions


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def by_the_book(unet, prompt, latents, timesteps, conditions):
    """One sample at a time through the library's UNet."""
    call = plain_unet(unet, prompt)
    rows = [
        torch.cat([call(latents[i : i + 1], timesteps[i : i + 1], c[None]) for c in conditions[i]])
        for i in range(len(latents))
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("rows, n, size", [(1, 5, 8), (3, 2, 8), (2, 1, 8), (2, 3, 7)])
@pytest.mark.parametrize("style", STYLES)
def test_shared_prompt_is_exact(style, rows, n, size):
    reference = tiny_unet(**STYLES[style]).eval().double()
    denoiser = make(tiny_unet(**STYLES[style]), dtype=torch.float64)
    assert denoiser.shares_prompt
    latents, timesteps, conditions = inputs(rows, n, size, torch.float64)
    results = []
    for call in (
        lambda c: by_the_book(reference, denoiser.prompt.double(), latents, timesteps, c),
        lambda c: denoiser.predict(latents, timesteps, c),
        lambda c: denoiser.predict(latents, timesteps, c, shared_prompt=False),
    ):
        leaf = conditions.clone().requires_grad_()
        outputs = call(leaf)
        weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        results.append((outputs.detach(), torch.autograd.grad((outputs * weights).sum(), leaf)[0]))
    (outputs, grads), *candidates = results
    assert (outputs - outputs[:, :1]).norm() > 1e-3 * outputs.norm() or n == 1, "the condition must matter"
    for candidate, candidate_grads in candidates:
        assert relative(candidate, outputs) < 1e-12
        assert relative(candidate_grads, grads) < 1e-10


@pytest.mark.parametrize("style", ["sd1", "sd2"])
def test_shared_prompt_in_fp32(style):
    denoiser = make(tiny_unet(**STYLES[style]))
    latents, timesteps, conditions = inputs()
    results = []
    for shared in (True, False):
        leaf = conditions.clone().requires_grad_()
        outputs = denoiser.predict(latents, timesteps, leaf, shared_prompt=shared)
        results.append((outputs.detach(), torch.autograd.grad(outputs.square().sum(), leaf)[0]))
    for ours, plain in zip(*results, strict=True):
        assert relative(ours, plain) < 1e-5


def test_the_library_is_not_touched():
    """The shortcuts live in one instance; another UNet of the same class keeps its processors and modules."""
    other = tiny_unet(attention_head_dim=2)
    before = {name: type(module) for name, module in other.named_modules()}
    denoiser = make()
    assert {name: type(module) for name, module in other.named_modules()} == before
    assert {name: type(m) for name, m in tiny_unet(attention_head_dim=2).named_modules()} == before
    assert any(type(m).__name__ == "OncePerRow" for m in denoiser.modules()["unet"].modules())


@pytest.mark.parametrize("style", NOT_COVERED)
def test_falls_back_with_a_warning(style, caplog):
    reference = tiny_unet(**NOT_COVERED[style]).eval()
    denoiser = make(tiny_unet(**NOT_COVERED[style]))
    assert not denoiser.shares_prompt
    latents, timesteps, conditions = inputs()
    expected = by_the_book(reference, denoiser.prompt, latents, timesteps, conditions)
    assert relative(denoiser.predict(latents, timesteps, conditions), expected) < 1e-5


def test_the_first_layers_run_once_per_row():
    denoiser = make()
    seen = {}
    unet = denoiser.modules()["unet"]
    first = unet.down_blocks[0]
    watched = {
        "conv_in": unet.conv_in.module,
        "resnet": first.resnets[0].module,
        "self_attention": first.attentions[0].transformer_blocks[0].attn1.module,
        "second_block": unet.down_blocks[1].resnets[0],
    }
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, len(args[0])))
    latents, timesteps, conditions = inputs(rows=2, n=5)
    denoiser.predict(latents, timesteps, conditions)
    assert seen == {"conv_in": 2, "resnet": 2, "self_attention": 2, "second_block": 10}


def test_an_error_inside_the_unet_does_not_leave_the_shortcut_on():
    denoiser = make()
    latents, timesteps, conditions = inputs()
    expected = denoiser.predict(latents, timesteps, conditions, shared_prompt=False)
    with pytest.raises(RuntimeError):
        denoiser.predict(latents[:, :3], timesteps, conditions)
    assert torch.equal(denoiser.predict(latents, timesteps, conditions, shared_prompt=False), expected)


@pytest.mark.parametrize("style", ["sd1", "sd2"])
@pytest.mark.parametrize("rows_per_chunk", [1, 3])
def test_loss_on_a_unet_rowwise_equals_dense(style, rows_per_chunk):
    reference = tiny_unet(**STYLES[style]).eval().requires_grad_(False)
    denoiser = make(tiny_unet(**STYLES[style]))
    latents, timesteps, conditions = inputs(rows=5, n=2)
    noisy, target = latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    judged = [c.clone().requires_grad_() for c in conditions.unbind(1)]
    expected = dense_dcr_loss(*judged, noisy, timesteps, target, plain_unet(reference, denoiser.prompt))
    expected.backward()
    leaves = [c.clone().requires_grad_() for c in conditions.unbind(1)]
    loss, _ = dcr_loss(*leaves, noisy, timesteps, target, denoiser.predict, rows_per_chunk=rows_per_chunk)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for leaf, judge in zip(leaves, judged, strict=True):
        assert relative(leaf.grad, judge.grad) < 1e-5


def test_nothing_in_it_is_trainable_or_gets_a_gradient():
    unet = tiny_unet(attention_head_dim=2).train().requires_grad_(True)
    denoiser = make(unet)
    assert not isinstance(denoiser, torch.nn.Module)
    latents, timesteps, conditions = inputs()
    denoiser.predict(latents, timesteps, conditions.requires_grad_()).sum().backward()
    for module in denoiser.modules().values():
        assert not module.training
        assert all(not p.requires_grad and p.grad is None for p in module.parameters())
    assert conditions.grad is not None


def test_half_precision_accumulates_the_condition_in_fp32():
    """The vector is not added to the tokens in bf16, and the layers' gradients for it are not summed in bf16."""
    exact = make(tiny_unet(**STYLES["sd2"]), dtype=torch.float64)
    half = make(tiny_unet(**STYLES["sd2"]), dtype=torch.bfloat16)
    latents, timesteps, conditions = inputs(rows=2, n=4)
    leaf = conditions.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = half.predict(latents, timesteps, leaf)
    assert outputs.dtype == torch.bfloat16
    outputs.float().sum().backward()
    assert leaf.grad.dtype == torch.float32
    expected = exact.predict(latents.double(), timesteps, conditions.double())
    assert relative(outputs, expected) < 3e-2


def test_autocast_does_not_change_the_precision_of_the_unet():
    denoiser = make()
    arguments = inputs()
    expected = denoiser.predict(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = denoiser.predict(*arguments)
        latents = denoiser.encode(torch.rand(1, 3, 16, 16))
    assert torch.equal(outputs, expected) and latents.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_and_target_against_the_scheduler(dtype):
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x, _, _ = inputs(rows=6, dtype=dtype)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    timesteps = torch.tensor([0, 1, 100, 500, 900, 999])
    eps, velocity = make(dtype=dtype), make(prediction_type="velocity", dtype=dtype)
    noisy = eps.add_noise(x, noise, timesteps)
    assert noisy.dtype == torch.float32
    torch.testing.assert_close(noisy, schedule.add_noise(x.float(), noise.float(), timesteps))
    assert torch.equal(eps.target(x, noise, timesteps), noise.float())
    expected = schedule.get_velocity(x.float(), noise.float(), timesteps)
    torch.testing.assert_close(velocity.target(x, noise, timesteps), expected)
    assert velocity.target(x, noise, timesteps).dtype == torch.float32


def test_first_timestep_has_noise_in_bf16():
    """In bf16 the scheduler's own arithmetic returns the clean latent there: a target that nothing could predict."""
    denoiser = make(dtype=torch.bfloat16)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    times = torch.tensor([0, 1])
    added = denoiser.add_noise(latents, noise, times) - latents.float()
    spread = added.flatten(1).std(dim=1)
    assert spread[0] == pytest.approx(0.00085**0.5, rel=0.15) and spread[1] > spread[0]


def test_oracle_that_returns_the_noise_matches_the_target_under_epsilon():
    latents, timesteps, _ = inputs(rows=4)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    conditions, positives = inputs(rows=4, n=2)[2].unbind(1)

    def oracle(noisy, times, grid):
        index = [int((noisy_latents == row).flatten(1).all(1).nonzero()) for row in noisy]
        return noise[index][:, None].expand(-1, grid.shape[1], -1, -1, -1)

    cosines = {}
    for kind in ("epsilon", "velocity"):
        denoiser = make(prediction_type=kind)
        noisy_latents = denoiser.add_noise(latents, noise, timesteps)
        target = denoiser.target(latents, noise, timesteps)
        _, stats = dcr_loss(conditions, positives, noisy_latents, timesteps, target, oracle)
        cosines[kind] = stats.cos_target.item()
    assert cosines["epsilon"] == pytest.approx(1.0, abs=1e-6)
    assert cosines["velocity"] < 0.95  # the published mistake: the wrong target can never be reached


def test_encode_is_the_scaled_mean_and_draws_no_random_number():
    denoiser = make(scaling_factor=0.5, shift_factor=0.3)
    vae = denoiser.modules()["vae"]
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    latents = denoiser.encode(images)
    assert torch.equal(torch.get_rng_state(), state)
    expected = (vae.encode(images * 2 - 1).latent_dist.mean - 0.3) * 0.5
    torch.testing.assert_close(latents, expected)
    assert tuple(latents.shape[1:]) == denoiser.latent_shape(16) and not latents.requires_grad


def test_load(tmp_path):
    path = save_tiny_denoiser(tmp_path / "sd", cross_attention_dim=32)
    denoiser = Denoiser.load(path)
    assert denoiser.prediction_type == "epsilon"
    assert denoiser.cross_attention_dim == 32 and denoiser.num_train_timesteps == 1000
    assert denoiser.shares_prompt and denoiser.prompt.shape == (77, 32)
    assert denoiser.dtype == torch.float32 and denoiser.device.type == "cpu"
    assert Denoiser.load(path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert Denoiser.load(path, prediction_type="velocity").prediction_type == "velocity"
    latents = denoiser.encode(torch.rand(1, 3, 32, 32))
    assert tuple(latents.shape) == (1, *denoiser.latent_shape(32))
    with pytest.raises(UserError, match="use 32"):
        denoiser.latent_shape(33)


def test_prediction_type_comes_from_the_files(tmp_path):
    path = save_tiny_denoiser(tmp_path / "sd", prediction_type="v_prediction")
    assert Denoiser.load(path).prediction_type == "velocity"
    config_file = path / "scheduler" / "scheduler_config.json"
    config = json.loads(config_file.read_text())
    # Another sampler's config, and one from before prediction_type existed: epsilon, as its samplers take it.
    del config["prediction_type"]
    config_file.write_text(json.dumps(config | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}))
    assert Denoiser.load(path).prediction_type == "epsilon"
    config_file.write_text(json.dumps(config | {"prediction_type": "sample"}))
    with pytest.raises(UserError, match="sample"):
        Denoiser.load(path)
    config_file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}))
    with pytest.raises(UserError, match="FlowMatch"):
        Denoiser.load(path)


def test_schedule_is_the_checkpoints(tmp_path):
    path = save_tiny_denoiser(tmp_path / "sd", prediction_type="v_prediction")
    options = {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01, "num_train_timesteps": 200}
    schedule = DDIMScheduler(**options, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    schedule.save_pretrained(path / "scheduler")
    denoiser = Denoiser.load(path)
    assert denoiser.num_train_timesteps == 200
    latents = torch.ones(200, 1, 1, 1)
    noisy = denoiser.add_noise(latents, torch.zeros_like(latents), torch.arange(200)).flatten()
    torch.testing.assert_close(noisy, schedule.alphas_cumprod.sqrt())
    assert noisy[-1] == 0


def test_empty_prompt_is_what_the_pipeline_encodes(tmp_path):
    from diffusers import StableDiffusionPipeline

    path = save_tiny_denoiser(tmp_path / "sd")
    pipeline = StableDiffusionPipeline.from_pretrained(
        path, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    expected = pipeline.encode_prompt("", "cpu", 1, False)[0][0]
    assert torch.equal(encode_empty_prompt(path), expected)


def test_padding_token_of_stable_diffusion_2(tmp_path):
    """SD 2.x pads with "!" (id 0), named only in the old special_tokens_map.json; another pad is another prompt."""
    path = save_tiny_denoiser(tmp_path / "sd")
    ours = encode_empty_prompt(path)
    shutil.rmtree(path / "tokenizer")
    (path / "tokenizer").mkdir()
    vocabulary = clip_tokenizer().get_vocab()
    files = {
        "vocab.json": vocabulary,
        "special_tokens_map.json": {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "!",
            "unk_token": "<|endoftext|>",
        },
        "tokenizer_config.json": {
            "model_max_length": 77,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "CLIPTokenizer",
        },
    }
    for name, content in files.items():
        (path / "tokenizer" / name).write_text(json.dumps(content))
    (path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    legacy = encode_empty_prompt(path)
    assert torch.equal(legacy[:2], ours[:2]) and not torch.allclose(legacy[2:], ours[2:])


def test_a_tokenizer_without_vocabulary_is_refused(tmp_path):
    path = save_tiny_denoiser(tmp_path / "sd")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (path / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="tokenizer"):
        Denoiser.load(path)


def test_parts_that_do_not_fit_are_refused():
    unet = tiny_unet(attention_head_dim=2)
    schedule = DDPMScheduler().alphas_cumprod
    with pytest.raises(UserError, match="cross_attention_dim 24"):
        Denoiser(tiny_vae(), unet, schedule, torch.randn(77, 32), prediction_type="epsilon")
    with pytest.raises(UserError, match="channels"):
        Denoiser(tiny_vae(latent_channels=8), unet, schedule, torch.randn(77, WIDTH), prediction_type="epsilon")
    with pytest.raises(ValueError, match="width 5"):
        make().predict(*inputs()[:2], torch.randn(2, 3, 5))
