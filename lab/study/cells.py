# The study: which runs test which claim. Every cell is a config, changes to it (dotted keys, as for --cfg-options) and
# seeds; `python -m lab.study` runs what has no result yet, `--dry-run` prints the plan and its cost.


def schedule(epochs, decay, gbr_every=10):
    """Decay lambda; the learning rate falls after 30, 60 and 90 % of the epochs; FGSM of all test images at the end."""
    gbr = [
        dict(type="GBRHook", num_samples=512, projections=1, output=x, interval=gbr_every) for x in ("logits", "probs")
    ]
    return {
        "train_cfg": dict(max_epochs=epochs, val_interval=3),
        "param_scheduler.milestones": [share * epochs // 10 for share in (3, 6, 9)],
        "optim_wrapper.optimizer.weight_decay": decay,
        "custom_hooks": [*gbr, dict(type="FGSMHook", eps=(1, 2, 4, 8), interval=1000)],
    }


# --- Arenas: data and schedule, decided once. lr is divided by 10 after 30, 60 and 90 % of the epochs. ---
arenas = dict(
    quarter=dict(
        title="CIFAR-10 (JPEG), 12,500 training images, 10 epochs, ResNet-20",
        config="lab/study/cifar10_resnet20.py",
        images=12_500,
        epochs=10,
        overrides={
            "train_dataloader.dataset.per_class": 1250,
            "train_cfg": dict(max_epochs=10, val_interval=2),
            "param_scheduler.milestones": [3, 6, 9],
        },
    ),
    # The paper's regime of decay: lambda 8.5e-3 has here the 33 e-folds of ||W||^2 that 1e-4 has in the paper's recipe.
    overfit=dict(
        title="CIFAR-10 (JPEG), 12,500 training images, 60 epochs, ResNet-20, decay 8.5e-3",
        config="lab/study/cifar10_resnet20.py",
        images=12_500,
        epochs=60,
        overrides={"train_dataloader.dataset.per_class": 1250, **schedule(60, 8.5e-3, gbr_every=3)},
        pgd=dict(eps=[2], steps=10),
    ),
    full=dict(
        title="CIFAR-10 (JPEG), all 50,000 training images, 15 epochs, ResNet-20",
        config="lab/study/cifar10_resnet20.py",
        images=50_000,
        epochs=15,
        overrides={"train_cfg.max_epochs": 15, "param_scheduler.milestones": [5, 9, 14]},
    ),
    digits=dict(
        title="scikit-learn's digits, 1,442 training images, 20 epochs, ResNet-8",
        config="lab/study/digits_resnet8.py",
        images=1_442,
        epochs=20,
        overrides={},
    ),
)

# Arenas for a GPU (`python -m lab.side_by_side`). The first repeats runs of another arena: do both ways of training agree?
arenas["g0"] = dict(arenas["quarter"], title="the arena quarter again, on a GPU", for_gpu=True, repeats="quarter")
thirty = dict(
    config="lab/study/cifar10_resnet20.py",
    images=50_000,
    epochs=30,
    overrides=schedule(30, 4e-3),  # 31 e-folds
    pgd=dict(eps=[2], steps=10),
    for_gpu=True,
)
everything = "CIFAR-10 (JPEG), all 50,000 training images"
arenas |= dict(
    g1=dict(thirty, title=f"{everything}, 30 epochs, ResNet-20, decay 4e-3", instead_of=("overfit", "full")),
    g2=dict(
        thirty,
        title=f"{everything}, 60 epochs, ResNet-20, decay 2e-3",
        epochs=60,
        overrides=schedule(60, 2e-3),  # 31 e-folds
        instead_of=("quarter",),
    ),
    g3=dict(thirty, title=f"{everything}, 30 epochs, ResNet-18, decay 4e-3", config="lab/study/cifar10_resnet18.py"),
    g4=dict(
        thirty,
        title=f"{everything}, 30 epochs, ResNet-20, decay 1e-3",
        overrides=schedule(30, 1e-3),
    ),
    g5=dict(
        arenas["overfit"],
        title="CIFAR-10 (JPEG), 12,500 training images, 60 epochs, ResNet-20, decay 8.5e-3, other seeds on a GPU",
        for_gpu=True,
        again="overfit",
    ),
)

# --- What cells are made of. ---
enc = {"model.type": "ENCImageClassifier"}
enc_fro = {**enc, "model.enc": dict(variant="fro")}
enc_wn = {**enc, "model.enc": dict(variant="wn")}
enc_cfro = {**enc, "model.enc": dict(variant="centered_fro")}
# Stock layers, held on the constraint set by the optimizer.
enc_retract = {**enc, "model.enc": dict(how="project"), "optim_wrapper.paramwise_cfg": dict(projection="retract")}
enc_rotate = {**enc, "model.enc": dict(how="project"), "optim_wrapper.paramwise_cfg": dict(projection="rotate")}
no_classifier_bn = {"model.enc": dict(post_norm=False)}
no_shift = {"optim_wrapper.paramwise_cfg": dict(shift_eps=0.0)}
plain_shift = {"optim_wrapper.paramwise_cfg": dict(plain_shift="ws")}
classifier_bn = {"model.head.type": "BNLinearClsHead"}
ws = {"model.backbone.conv_cfg": dict(type="ConvWS")}
wn = {"model.backbone.conv_cfg": dict(type="WNConv2d")}
smooth = {"model.head.loss": dict(type="LabelSmoothLoss", label_smooth_val=0.1)}
mixup = {"model.train_cfg": dict(augments=dict(type="Mixup", alpha=0.2))}
cutmix = {"model.train_cfg": dict(augments=dict(type="CutMix", alpha=1.0))}
cutmix_ls = {**cutmix, **smooth}
# A square of half the side, filled with the mean pixel (BGR), which the preprocessor turns into zero.
cutout = {
    "train_dataloader.dataset.pipeline": [
        dict(type="RandomCrop", crop_size=32, padding=4),
        dict(type="RandomFlip", prob=0.5, direction="horizontal"),
        dict(type="Cutout", shape=16, pad_val=(114, 123, 125), prob=1.0),
        dict(type="PackInputs"),
    ]
}
ws_bn = {**ws, **classifier_bn}
bn_eps = {"default_hooks.bn_eps": dict(type="BatchNormEpsHook", eps=1e-12)}
decay = "optim_wrapper.optimizer.weight_decay"
lr = "optim_wrapper.optimizer.lr"

three, four, five, others = [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [4, 5, 6]

# --- Cells that train alike, given batch norm (docs/gauge.md). ---
kept, kept_bn = dict(gauge="row means kept"), dict(gauge="row means kept + classifier BN")
removed, removed_bn = dict(gauge="row means removed"), dict(gauge="row means removed + classifier BN")

# --- What several arenas for a GPU have in common. ---
four_networks = {
    "baseline": dict(title="plain", overrides={}, seeds=three, **kept),
    "bn": dict(title="plain + classifier BN", overrides=classifier_bn, seeds=three, **kept_bn),
    "ws-bn": dict(title="WS + classifier BN", overrides=ws_bn, seeds=three, **removed_bn),
    "enc-ws": dict(title="ENC 'ws' (eq. 22)", overrides=enc, seeds=three, **removed_bn),
}


def with_decay(name, at):
    """One of the four networks at another decay than the arena's."""
    cell = four_networks[name]
    title = cell["title"].removesuffix(", eq. 22")
    return dict(title=f"{title}, decay {at}", overrides={**cell["overrides"], decay: float(at)}, seeds=cell["seeds"])


def forms(seeds):
    """ENC without its batch norm, and eq. 22 held by the optimizer (docs/gauge.md)."""
    nobn = {**enc, "model.enc": dict(exclude="head")}
    # The last two have no class: what the length of steps depends on is not the decay.
    return {
        "enc-ws-nobn": dict(title="ENC, plain classifier", overrides=nobn, seeds=seeds, **removed),
        "enc-retract": dict(title="ENC 'ws' (eq. 22), retracted", overrides=enc_retract, seeds=seeds),
        "enc-rotate": dict(title="ENC 'ws' (eq. 22), rotated", overrides=enc_rotate, seeds=seeds),
    }


def noise(std):
    """Gaussian noise on the normalised input."""
    return {"model.train_cfg": dict(augments=dict(type="GaussianNoise", std=std))}


def penalty(weight):
    """The GBR of the logits as a term of the loss."""
    return {"model.type": "GBRImageClassifier", "model.gbr_penalty": dict(weight=weight)}


# --- The cells of each arena, in the order in which they run. A cell's first seeds run before any cell's later ones. ---
cells = dict(
    quarter={
        # Table 1 and figure 2
        "baseline": dict(title="plain", seeds=five, **kept),
        "enc-ws": dict(title="ENC 'ws' (eq. 22)", overrides=enc, seeds=five, **removed_bn),
        # which part does the work?
        "bn": dict(title="plain + classifier BN", overrides=classifier_bn, seeds=three, **kept_bn),
        # The constraint acts on the function here: no batch norm undoes the classifier's norm.
        "enc-ws-nobn": dict(title="ENC without classifier BN", overrides={**enc, **no_classifier_bn}, seeds=three),
        "ws": dict(title="WS", overrides=ws, seeds=five, **removed),
        "ws-bn": dict(title="WS + classifier BN", overrides=ws_bn, seeds=list(range(12)), **removed_bn),
        "enc-ws-noshift": dict(title="ENC without the shift", overrides={**enc, **no_shift}, seeds=three, **removed_bn),
        "bn-shift": dict(
            title="plain + classifier BN + shift", overrides={**classifier_bn, **plain_shift}, seeds=three, **kept_bn
        ),
        "enc-ws-bneps": dict(title="ENC, BN eps 1e-12", overrides={**enc, **bn_eps}, seeds=three, **removed_bn),
        "enc-fro": dict(title="ENC 'fro' (eq. 20)", overrides=enc_fro, seeds=three, **kept_bn),
        "enc-wn": dict(title="ENC 'wn' (eq. 21)", overrides=enc_wn, seeds=three, **kept_bn),
        "enc-cfro": dict(title="ENC 'centered_fro' (eq. 23)", overrides=enc_cfro, seeds=three),
        "wn": dict(title="WN", overrides=wn, seeds=three, **kept),
        # figure 1 (decay 1e-4 is the baseline), figure 3
        "wd1e-3": dict(title="decay 1e-3", overrides={decay: 1e-3}, seeds=three),
        "wd0": dict(title="decay 0", overrides={decay: 0.0}, seeds=three),
        "wd1e-2": dict(title="decay 1e-2", overrides={decay: 1e-2}, seeds=three),
        "wd1e-6": dict(title="decay 1e-6", overrides={decay: 1e-6}, seeds=three),
        "wd1e-8": dict(title="decay 1e-8", overrides={decay: 1e-8}, seeds=three),
        # learning rates for both sides
        "lr0.03": dict(title="plain, lr 0.03", overrides={lr: 0.03}, seeds=three),
        "enc-ws-lr0.03": dict(title="ENC, lr 0.03", overrides={**enc, lr: 0.03}, seeds=three),
        "lr0.3": dict(title="plain, lr 0.3", overrides={lr: 0.3}, seeds=three),
        "enc-ws-lr0.3": dict(title="ENC, lr 0.3", overrides={**enc, lr: 0.3}, seeds=three),
        # Tables 2 and 3
        "ls": dict(title="LS", overrides=smooth, seeds=three),
        "enc-ls": dict(title="ENC + LS", overrides={**enc, **smooth}, seeds=three),
        "cutmix": dict(title="CutMix", overrides=cutmix, seeds=three),
        "enc-cutmix": dict(title="ENC + CutMix", overrides={**enc, **cutmix}, seeds=three),
        "mixup": dict(title="Mixup", overrides=mixup, seeds=three),
        "enc-mixup": dict(title="ENC + Mixup", overrides={**enc, **mixup}, seeds=three),
        "cutout": dict(title="Cutout", overrides=cutout, seeds=three),
        "enc-cutout": dict(title="ENC + Cutout", overrides={**enc, **cutout}, seeds=three),
        "enc-cutmix-ls": dict(title="ENC + CutMix + LS", overrides={**enc, **cutmix, **smooth}, seeds=three),
        # Table 5
        "enc-a0.5": dict(
            title="ENC, alpha 0.5", overrides={**enc, "model.enc": dict(alpha=0.5)}, seeds=three, **removed_bn
        ),
        "enc-a2": dict(
            title="ENC, alpha 2", overrides={**enc, "model.enc": dict(alpha=2.0)}, seeds=three, **removed_bn
        ),
        "enc-alearn": dict(
            title="ENC, learnable alpha", overrides={**enc, "model.enc": dict(alpha="learnable")}, seeds=three
        ),
        # the rival that the paper calls too costly
        "gbr-penalty": dict(
            title="GBR penalty 1e-3",
            overrides=penalty(1e-3),
            seeds=three,
        ),
    },
    # Block b is the first four cells, c the decays, d the next, e the last two: each whole by itself, in this order.
    overfit={
        "baseline": dict(title="plain", seeds=four, **kept),
        "bn": dict(title="plain + classifier BN", overrides=classifier_bn, seeds=four, **kept_bn),
        "ws-bn": dict(title="WS + classifier BN", overrides=ws_bn, seeds=four, **removed_bn),
        "enc-ws": dict(title="ENC 'ws' (eq. 22)", overrides=enc, seeds=four, **removed_bn),
        "wd0": dict(title="plain, decay 0", overrides={decay: 0.0}, seeds=three),
        "wd1e-4": dict(title="plain, decay 1e-4", overrides={decay: 1e-4}, seeds=three),
        "wd1e-3": dict(title="plain, decay 1e-3", overrides={decay: 1e-3}, seeds=three),
        "wd3e-3": dict(title="plain, decay 3e-3", overrides={decay: 3e-3}, seeds=three),
        "wd3e-2": dict(title="plain, decay 3e-2", overrides={decay: 3e-2}, seeds=three),
        **forms(three),
    },
    full={
        "baseline": dict(title="plain", seeds=three, **kept),
        "enc-ws": dict(title="ENC 'ws' (eq. 22)", overrides=enc, seeds=three, **removed_bn),
        "bn": dict(title="plain + classifier BN", overrides=classifier_bn, seeds=three, **kept_bn),
        "ws": dict(title="WS", overrides=ws, seeds=three, **removed),
    },
    digits={
        "baseline": dict(title="plain", seeds=five, **kept),
        "enc-ws": dict(title="ENC 'ws' (eq. 22)", overrides=enc, seeds=five, **removed_bn),
        "bn": dict(title="plain + classifier BN", overrides=classifier_bn, seeds=five, **kept_bn),
        "ws": dict(title="WS", overrides=ws, seeds=five, **removed),
        "enc-fro": dict(title="ENC 'fro' (eq. 20)", overrides=enc_fro, seeds=five, **kept_bn),
        "enc-wn": dict(title="ENC 'wn' (eq. 21)", overrides=enc_wn, seeds=five, **kept_bn),
        "enc-cfro": dict(title="ENC 'centered_fro' (eq. 23)", overrides=enc_cfro, seeds=five),
        "wn": dict(title="WN", overrides=wn, seeds=five, **kept),
    },
    # Of runs that the study has: cells of the arena quarter, with seeds that have run there.
    g0={name: {**four_networks[name], "seeds": five} for name in ("baseline", "ws-bn", "enc-ws")},
    # Figures 1 and 3, table 1. Three seeds are whole by themselves; more are declared before they run.
    g1={
        **four_networks,
        **{f"wd{at}": with_decay("baseline", at) for at in ("0", "1e-4", "5e-4", "1e-3", "1e-2")},
        **{f"{name}-wd{at}": with_decay(name, at) for at in ("1e-4", "1e-3") for name in ("bn", "ws-bn", "enc-ws")},
    },
    # Tables 2 and 3, where augmentation has time to help.
    g2={
        "baseline": dict(title="plain", seeds=four, **kept),
        "ws-bn": dict(title="WS + classifier BN", overrides=ws_bn, seeds=four, **removed_bn),
        "enc-ws": dict(title="ENC 'ws' (eq. 22)", overrides=enc, seeds=four, **removed_bn),
        "ls": dict(title="LS", overrides=smooth, seeds=four),
        "ws-bn-ls": dict(title="WS + classifier BN + LS", overrides={**ws_bn, **smooth}, seeds=four),
        "enc-ls": dict(title="ENC + LS", overrides={**enc, **smooth}, seeds=four),
        "cutmix": dict(title="CutMix", overrides=cutmix, seeds=four),
        "ws-bn-cutmix": dict(title="WS + classifier BN + CutMix", overrides={**ws_bn, **cutmix}, seeds=four),
        "enc-cutmix": dict(title="ENC + CutMix", overrides={**enc, **cutmix}, seeds=four),
        "cutmix-ls": dict(title="CutMix + LS", overrides=cutmix_ls, seeds=four),
        "ws-bn-cutmix-ls": dict(title="WS + classifier BN + CutMix + LS", overrides={**ws_bn, **cutmix_ls}, seeds=four),
        "enc-cutmix-ls": dict(title="ENC + CutMix + LS", overrides={**enc, **cutmix_ls}, seeds=four),
    },
    # Does g1 hold near a training loss of zero?
    g3={
        **four_networks,
        "wd5e-4": with_decay("baseline", "5e-4"),
        **{f"{name}-wd5e-4": with_decay(name, "5e-4") for name in ("bn", "ws-bn", "enc-ws")},
    },
    # Clean accuracy against PGD-10: what a user who wants robustness should take, at three strengths each.
    g4={
        "plain": dict(title="plain", seeds=three),
        **{f"wd{at}": with_decay("baseline", at) for at in ("4e-3", "1e-2", "2e-2")},
        **{
            f"noise{std}": dict(title=f"input noise {std}", overrides=noise(std), seeds=three)
            for std in (0.1, 0.2, 0.4)
        },
        **{
            f"penalty{x:g}": dict(title=f"GBR penalty {x:g}", overrides=penalty(x), seeds=three)
            for x in (1e-3, 1e-2, 0.1)
        },
        **{f"enc-wd{at}": with_decay("enc-ws", at) for at in ("1e-3", "4e-3", "1e-2")},
    },
    # The arena overfit with seeds that did not run there; batch norm or constraint; the forms of the constraint.
    g5={
        **{name: {**cell, "seeds": others} for name, cell in four_networks.items()},
        **forms(others),
    },
)
