"""A small model of each family of timm and torchvision: its meta-gradient against finite differences."""

import pytest
import torch
from torch import nn

from l2g_meta import L2GWrapper, MetricModel, PrototypicalHead, Task

TIMM = """
beit_base_patch16_224 cait_xxs24_224 coat_tiny coatnet_pico_rw_224 convit_tiny convmixer_768_32 convnext_atto_rms
cpubone_nano crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121
dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0
efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 flexivit_small
focalnet_tiny_srf gcvit_xxtiny ghostnet_050 gmlp_ti16_224 halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small
legacy_seresnet18 legacy_xception levit_384_s8 lowformer_b0 mambaout_femto mixnet_s mobilenetv3_small_050
mobilenetv5_base mobileone_s1 mobilevit_xxs mvitv2_tiny nasnetalarge nest_tiny nextvit_small nf_regnet_b0 pit_ti_224
pnasnet5large poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_004_tv repghostnet_050 repvit_m1
res2net50_14w_8s resnest14d resnet18 resnetv2_18 rexnet_100 sam2_hiera_tiny samvit_base_patch16_224 selecsls42
sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window8_256 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small visformer_tiny
vit_srelpos_small_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p xcit_nano_12_p8_224
deepseek_vit_412m gemma4_vit_167m naflexvit_base_patch16_gap vgg11_bn
""".split()
TINY = dict.fromkeys(  # families whose models are all large
    ("deepseek_vit_412m", "gemma4_vit_167m", "naflexvit_base_patch16_gap"),
    {"embed_dim": 64, "depth": 2, "num_heads": 2},
) | {"vgg11_bn": {"mlp_ratio": 1 / 64}}
TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2
mobilenet_v3_small regnet_x_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1 swin_t vgg11_bn vit_b_32
""".split()
SIZE = 64  # pixels, where a family takes them


def of_timm(name):
    timm = pytest.importorskip("timm")
    for options in ({"img_size": SIZE}, {}):
        try:
            net = timm.create_model(name, num_classes=0, **options, **TINY.get(name, {}))
        except (TypeError, AssertionError, ValueError, RuntimeError):
            continue
        fixed, own = net.pretrained_cfg.get("fixed_input_size"), net.pretrained_cfg["input_size"][-1]
        for size in (SIZE, own) if options or not fixed else (own,):
            try:
                if net.eval()(torch.randn(2, 3, size, size)).ndim == 2:
                    return net, size
            except (RuntimeError, AssertionError, ValueError, IndexError):
                continue
    pytest.fail(f"{name} takes no images that we know of")


def of_torchvision(name):
    from torchvision import models

    size = {"inception_v3": 96, "swin_t": SIZE, "vit_b_32": 224, "maxvit_t": 224}.get(name, SIZE)
    own = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=8, **own), size


@pytest.mark.slow
def test_every_family_of_timm_has_a_model_in_the_list():
    models = pytest.importorskip("timm").models

    def families(names):
        return {models.model_entrypoint(name).__module__ for name in names}

    assert families(models.list_models()) == families(TIMM)


def drawn(size):
    x, y = torch.randn(2, 4, 3, size, size, dtype=torch.float64), torch.arange(4) % 2
    return [Task(x[k, :2], y[:2], x[k, 2:], y[2:], 2) for k in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("make, name", [*((of_timm, n) for n in TIMM), *((of_torchvision, n) for n in TORCHVISION)])
def test_the_meta_gradient_of_a_family(make, name):
    torch.manual_seed(0)
    net, size = make(name)
    model = MetricModel(net, PrototypicalHead()).double().train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    with torch.no_grad():  # weights that begin as zeros put inputs of ReLU where it has a kink
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=1e-2)
    pair = drawn(size)

    def loss(**options):
        torch.manual_seed(1)  # of what the network draws
        return L2GWrapper(model, 0.01, **options)(*pair)

    parameters = [p for p in model.parameters() if p.requires_grad]
    g = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    stock = torch.autograd.grad(loss(fast=False), parameters, allow_unused=True, materialize_grads=True)
    norm = torch.stack([t.norm() for t in g]).norm()
    assert norm.isfinite() and norm > 0
    assert (
        torch.stack([(a - b).norm() for a, b in zip(g, stock, strict=True)]).norm() < 1e-6 * norm
    )  # what chaos leaves

    def along(length):  # the loss at that distance along the gradient
        with torch.no_grad():
            old = [p.clone() for p in parameters]
            for p, t in zip(parameters, g, strict=True):
                p.add_(t, alpha=(length / norm).item())
        value = loss().item()
        with torch.no_grad():
            for p, t in zip(parameters, old, strict=True):
                p.copy_(t)
        return value

    # Untrained deep networks are nearly chaotic: of two distances one is short enough and not lost in rounding.
    slopes = [(along(h) - along(-h)) / (2 * h) for h in ((change / norm).item() for change in (1e-5, 1e-6))]
    assert min(abs(slope / norm.item() - 1) for slope in slopes) < 5e-3, slopes
