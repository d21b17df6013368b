"""Fixed samples are those of the training set, as its own steps load them, each once, in the unit that they state."""

from __future__ import annotations

import copy
import random

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.datasets import CustomDataset, KFoldDataset
from mmpretrain.structures import DataSample
from torch.utils.data import Dataset, Subset

from enc_plugin.measuring.pipelines import WithoutReplacement, find_pipeline
from enc_plugin.measuring.robustness import check_dataset, measure_robustness
from enc_plugin.measuring.samples import FixedSamples, choose_samples

PACK = [dict(type="PackInputs")]
ARCHIVES = {"train": 10, "more": 90, "val": 200}  # first grey level; the keys of all begin at 0


@TRANSFORMS.register_module(force=True)
class _FromArchive(BaseTransform):
    """Picture ``key`` of an archive: grey levels that tell the archive and the key."""

    def __init__(self, archive, way="in place"):
        self.archive, self.way = archive, way

    def transform(self, results):
        picture = np.full((8, 8, 3), ARCHIVES[self.archive] + results["key"], np.uint8)
        if self.way == "another dict":
            return {**results, "img": picture, "img_shape": (8, 8)}
        results = results.copy() if self.way == "a copy" else results
        results["img"] = picture
        results["img_shape"] = results["img"].shape[:2]
        return results


@TRANSFORMS.register_module(force=True)
class _LabelFromTable(BaseTransform):
    """A label that is loaded, as the picture is."""

    def __init__(self, label):
        self.label = label

    def transform(self, results):
        results["gt_label"] = self.label
        return results


@TRANSFORMS.register_module(force=True)
class _Refuse(BaseTransform):
    """Augmentation, which no measurement may run."""

    def transform(self, results):
        raise AssertionError("augmentation ran")


@TRANSFORMS.register_module(force=True)
class _OwnNoise(BaseTransform):
    """A transform with a random state of its own."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def transform(self, results):
        results["img"] = results["img"] + self.generator.integers(0, 2, dtype=np.uint8)
        return results


class Keyed(BaseDataset):
    METAINFO = dict(classes=tuple("abc"))

    def load_data_list(self):
        return [dict(key=i, gt_label=i % 3) for i in range(12)]

    def get_cat_ids(self, index):
        return [self.get_data_info(index)["gt_label"]]


@pytest.fixture(autouse=True)
def _scope():
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield


def keyed(archive="train", *rest, way="in place"):
    return Keyed(pipeline=[dict(type="_FromArchive", archive=archive, way=way), *rest])


VAL = [dict(type="_FromArchive", archive="val"), dict(type="Resize", scale=4), dict(type="PackInputs")]


def levels(samples: FixedSamples) -> list[int]:
    """The grey level of each sample."""
    return [int(picture.max()) for number in range(len(samples.batches)) for picture in samples.batch(number)[0]]


@pytest.mark.parametrize("way", ["in place", "a copy", "another dict"])
def test_the_dataset_loads_and_the_test_pipeline_does_the_rest(way):
    refuse = dict(type="_Refuse")
    plain, more = keyed("train", refuse, way=way), keyed("more", refuse, way=way)
    val = [dict(VAL[0], way=way), *VAL[1:]]
    for dataset, indices, expected in (
        (plain, [0, 5], [10, 15]),
        (RepeatDataset(plain, 3), [0, 17], [10, 15]),
        (ClassBalancedDataset(plain, 0.01), [0, 5], [10, 15]),
        (ConcatDataset([plain, more]), [5, 17], [15, 95]),
        (RepeatDataset(KFold(plain), 2), [0, 1], [14, 15]),
        (Subset(plain, [7, 2]), [0, 1], [17, 12]),
        (torch.utils.data.ConcatDataset([more, plain]), [0, 12], [90, 10]),
    ):
        samples = FixedSamples(dataset, val, indices, 2)
        assert levels(samples) == expected
        assert samples.batch(0)[0].shape == (2, 3, 4, 4)
        assert plain.pipeline.transforms[1].__class__ is _Refuse  # nothing stays replaced


def KFold(dataset):  # noqa: N802
    """The last two of three folds; mmpretrain's class builds from a config only."""
    config = dict(type=Keyed, pipeline=dataset.pipeline.transforms, lazy_init=False)
    return _Base(KFoldDataset(config, fold=0, num_splits=3))


class _Base(BaseDataset):
    """A dataset that hands on to another one: what wrappers of users do."""

    def __init__(self, dataset):
        self.dataset = dataset
        self._metainfo = dataset.metainfo
        self._fully_initialized = True

    def full_init(self):
        pass

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


def test_loading_that_takes_several_steps_or_another_class_is_left_to_the_dataset(tmp_path):
    dataset = keyed("train", dict(type="_LabelFromTable", label=2), dict(type="_Refuse"))
    # The validation set's files: there are none for these samples.
    val = [dict(type="LoadImageFromFile"), dict(type="_LabelFromTable", label=1), *VAL[1:]]
    samples = FixedSamples(dataset, val, [3, 4], 2)
    assert levels(samples) == [13, 14]
    assert samples.batch(0)[1].tolist() == [0, 1]  # those of the data list: no label of the validation set
    own = FixedSamples(dataset, VAL, [3, 4], 2, own_loading=False)
    assert levels(own) == [203, 204]
    with pytest.raises(ValueError, match="pipeline: expected packed samples with an image.*loading step"):
        FixedSamples(dataset, VAL[1:], [3, 4], 2, own_loading=False)


def test_a_pipeline_with_test_time_augmentation_is_refused():
    flips = [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)]
    val = [VAL[0], dict(type="TestTimeAug", transforms=[flips, [dict(type="PackInputs")]])]
    with pytest.raises(ValueError, match="pipeline: expected one image for each sample, got a list of 2.*TestTimeAug"):
        FixedSamples(keyed(), val, [0, 1], 2)


def test_a_step_of_the_test_pipeline_that_fails_on_a_picture_is_not_left_out():
    val = [VAL[0], dict(type="Resize", scale=-1), dict(type="PackInputs")]
    with pytest.raises(Exception, match=r"."):
        FixedSamples(keyed(), val, [0, 1], 2)


def test_random_states_of_the_test_pipelines_own_stay_as_they_were():
    dataset = keyed("val", dict(type="_OwnNoise"), dict(type="PackInputs"))
    state = copy.deepcopy(dataset.pipeline.transforms[1].generator.bit_generator.state)
    FixedSamples(keyed(), dataset.pipeline.transforms, [0, 1, 2], 2)
    assert dataset.pipeline.transforms[1].generator.bit_generator.state == state


@pytest.mark.parametrize("num_samples", [5, None, 100])
def test_no_sample_is_chosen_twice_however_often_it_is_repeated(num_samples):
    plain = keyed()
    repeated = RepeatDataset(plain, 10)
    rare = ClassBalancedDataset(plain, 4.0)
    assert len(rare) > 12
    twice = ConcatDataset([plain, keyed()])
    for dataset in (repeated, rare, twice):
        chosen = choose_samples(dataset, num_samples, seed=0)
        assert len(chosen) == min(num_samples or 12, 12)
        found = levels(FixedSamples(dataset, VAL, chosen, 4))
        assert len(set(found)) == len(found)
    assert choose_samples(plain, num_samples, seed=0) == choose_samples(12, num_samples, seed=0)


def folder(path, missing=()):
    """A CustomDataset of 12 pictures of one grey level each, the file of some gone."""
    path.mkdir()
    for i in range(12):
        if i not in missing:
            cv2.imwrite(str(path / f"{i}.png"), np.full((8, 8, 3), 10 + i, np.uint8))
    return path


def listed(path, lines, kind=CustomDataset, **loading):
    (path / "ann.txt").write_text("".join(f"{i}.png {i % 2}\n" for i in lines))
    pipeline = [dict(type="LoadImageFromFile", **loading), dict(type="PackInputs")]
    return kind(data_root=str(path), ann_file="ann.txt", classes=["a", "b"], pipeline=pipeline)


def test_a_file_that_is_listed_twice_is_one_sample(tmp_path):
    dataset = listed(folder(tmp_path / "data"), [0, 1, 1, 1, 2, 2])
    assert sorted(levels(FixedSamples(dataset, VAL, choose_samples(dataset, None, 0), 4))) == [10, 11, 12]


def test_samples_that_cannot_be_read_are_left_out_and_no_other_takes_their_place(tmp_path):
    dataset = listed(folder(tmp_path / "data", missing=[3, 4]), range(12), ignore_empty=True)
    samples = FixedSamples(dataset, VAL, [2, 3, 4, 5, 6], 2)
    assert samples.left_out == [3, 4]
    assert samples.batches == [[2], [5], [6]]
    assert levels(samples) == [12, 15, 16]
    with pytest.raises(ValueError, match="2 of 3 chosen samples cannot be read"):
        FixedSamples(dataset, VAL, [3, 4, 5], 2)
    single = WithoutReplacement(dataset)
    assert single[3] is None
    assert single[5]["inputs"].max() == 15


class _Retries(CustomDataset):
    """Takes another picture if one cannot be opened, as many datasets do."""

    def __getitem__(self, index):
        while True:
            try:
                return self.prepare_data(index)
            except Exception:
                index = np.random.randint(len(self))


def test_a_dataset_that_retries_with_another_index_does_so_in_no_measurement(tmp_path):
    path = folder(tmp_path / "data", missing=[0, 3])
    dataset = listed(path, range(12), kind=_Retries)
    assert [index for index in range(12) if WithoutReplacement(dataset)[index] is None] == [0, 3]
    assert FixedSamples(dataset, VAL, range(6), 2).left_out == [0, 3]
    failing = listed(path, range(12))
    for read in (lambda: WithoutReplacement(failing)[3], lambda: FixedSamples(failing, VAL, range(6), 2)):
        with pytest.raises(FileNotFoundError, match="png"):
            read()


class _Threshold(torch.nn.Module):
    """Class 1 where the picture is lighter than grey level 15.5."""

    def __init__(self):
        super().__init__()
        from mmpretrain.models import ClsDataPreprocessor

        self.data_preprocessor = ClsDataPreprocessor()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs, mode):
        light = inputs.mean((1, 2, 3)) - 15.5
        return self.scale * torch.stack([-light, light], 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_attack_counts_only_what_can_be_read(workers, tmp_path):
    dataset = listed(folder(tmp_path / "data", missing=[0, 1, 2, 3, 4, 5, 7]), range(12), ignore_empty=True)
    random.seed(0)
    np.random.seed(0)
    found = measure_robustness(_Threshold(), dataset, [1], batch_size=4, num_workers=workers)
    # 6, 8, 9, 10 and 11 are light, so all of them are taken for class 1: two are right.
    assert (found.num_samples, found.left_out) == (5, 7)
    assert found.clean == pytest.approx(40)
    assert "7 of 12 samples cannot be read and are left out" in found.warnings[0]


class Packed(Dataset):
    """A dataset without a pipeline."""

    def __init__(self, draws=False):
        self.draws = draws

    def __len__(self):
        return 4

    def __getitem__(self, index):
        picture = torch.full((3, 4, 4), 10 + index, dtype=torch.uint8)
        noise = torch.randint(0, 9, picture.shape, dtype=torch.uint8) if self.draws else 0
        return {"inputs": picture + noise, "data_samples": DataSample().set_gt_label(0)}


def test_a_dataset_without_a_pipeline_is_taken_if_it_gives_the_same_sample_each_time():
    assert levels(FixedSamples(Packed(), [], choose_samples(Packed(), 3, 0), 2)) == [10, 11, 13]
    with pytest.raises(TypeError, match="Packed has no pipeline and returns another image each time"):
        FixedSamples(Packed(draws=True), [], [0, 1], 2)


def test_a_random_flip_in_a_dataset_without_a_pipeline_is_found_although_two_reads_may_agree():
    class Flipped(Packed):
        def __getitem__(self, index):
            picture = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
            return super().__getitem__(index) | {"inputs": picture.flip(2) if torch.rand(()) < 0.5 else picture}

    for seed in range(8):
        torch.manual_seed(seed)
        with pytest.raises(TypeError, match="returns another image each time"):
            FixedSamples(Flipped(), [], [0, 1], 2)


class Pixels(Dataset):
    """Pictures of the given values."""

    def __init__(self, *pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return {"inputs": self.pictures[index], "data_samples": DataSample().set_gt_label(0)}


def floats(*values):
    return [torch.full((3, 2, 2), float(value)) for value in values]


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (floats(0, 0.5, 1), "got 0..1"),
        (floats(0, 100, 65535), "got .*..65535"),
        (floats(10, 20, -3), "got -3"),
        (floats(0, 0, 0.25), "got 0..0.25"),
        ([torch.full((3, 2, 2), 4000, dtype=torch.int32)] * 2, "got 4000..4000"),
    ],
)
def test_pixels_of_another_range_are_refused_whichever_sample_shows_it(pictures, message):
    dataset = Pixels(*pictures)
    samples = FixedSamples(dataset, [], range(len(dataset)), 1)
    for check in (
        samples.check_pixels,
        lambda: check_dataset(dataset, None),
        lambda: measure_robustness(_Threshold(), dataset, [1], batch_size=1),
    ):
        with pytest.raises(ValueError, match=f"expected pixels in 0..255, {message}"):
            check()


def test_dark_pictures_are_not_taken_for_another_range():
    for dataset in (Pixels(*floats(0, 1, 0.5, 200)), Pixels(torch.ones(3, 2, 2, dtype=torch.uint8), *floats()[:0])):
        FixedSamples(dataset, [], range(len(dataset)), 1).check_pixels()
        check_dataset(dataset, None)
        assert measure_robustness(_Threshold(), dataset, [1], batch_size=1).num_samples == len(dataset)


def test_samples_are_chosen_by_seed_without_repetition():
    chosen = choose_samples(1000, 50, seed=1)
    assert chosen == sorted(set(chosen)) == choose_samples(1000, 50, seed=1)
    assert chosen != choose_samples(1000, 50, seed=2)
    assert choose_samples(5, None, seed=0) == choose_samples(5, 50, seed=0) == list(range(5))


def test_a_slice_of_a_dataset_is_read_without_augmentation_and_without_replacement(tmp_path):
    def sliced(dataset):  # what mmengine makes of num_batch_per_epoch
        loader = dict(batch_size=2, num_batch_per_epoch=2, dataset=dataset, sampler=dict(type="DefaultSampler"))
        return Runner.build_dataloader(loader).dataset

    with DefaultScope.overwrite_default_scope("mmengine"):
        slices = [sliced(data) for data in (keyed("train", dict(type="_Refuse")), RepeatDataset(keyed(), 2))]
    for dataset in slices:
        assert choose_samples(dataset, None, seed=0) == [0, 1, 2, 3]
        samples = FixedSamples(dataset, VAL, [0, 2], 2)
        assert levels(samples) == levels(FixedSamples(keyed(), VAL, [0, 2], 2))
    missing = Keyed(pipeline=[lambda info: None if info["key"] == 1 else {"sample": info["key"]}])
    with DefaultScope.overwrite_default_scope("mmengine"):
        source = WithoutReplacement(sliced(missing))
    assert [source[index] for index in range(3)] == [{"sample": 0}, None, {"sample": 2}]


def test_the_pipeline_is_found_within_wrappers_built_or_not():
    assert find_pipeline(dict(type="RepeatDataset", dataset=dict(type="Digits", pipeline=PACK))) == PACK
    assert len(find_pipeline(RepeatDataset(keyed(), 2))) == 1
    assert find_pipeline(dict(type="Digits")) is None
    assert find_pipeline(None) is None


def test_a_dataset_that_runs_its_own_pipeline_only_is_refused():
    with pytest.raises(TypeError, match="TensorDataset has no get_data_info"):
        FixedSamples(torch.utils.data.TensorDataset(torch.zeros(3, 1)), PACK, [0], 1)
