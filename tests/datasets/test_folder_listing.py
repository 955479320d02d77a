"""Listing a folder of class folders: links, permissions, other formats and data sets already split."""

import os
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from sklearn_sparseattn.datasets import load_image_folder


def save(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 70, np.uint8)).save(file)


@pytest.fixture
def root(tmp_path):
    """Two classes of two images."""
    folder = tmp_path / "root"
    save(*(folder / label / f"{i}.png" for label in "ab" for i in range(2)))
    return folder


@contextmanager
def nobody():
    """Root may list every folder: be another user for a while, if this is root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def names_of(data, root):
    return [os.path.relpath(file, root) for file in data.filenames]


def test_linked_folders_and_files_are_followed(root, tmp_path):
    save(tmp_path / "elsewhere" / "deep" / "5.png", tmp_path / "one.png")
    (root / "a" / "batch").symlink_to(tmp_path / "elsewhere")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "7.png").symlink_to(tmp_path / "one.png")
    data = load_image_folder(root)
    expected = ["a/0.png", "a/1.png", "a/batch/deep/5.png", "b/0.png", "b/1.png", "b/7.png", "c/deep/5.png"]
    assert names_of(data, root) == expected
    assert data.target.tolist() == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("target", [".", "..", "../..", "../a"])
def test_a_link_to_a_folder_that_holds_it_is_not_followed_and_named(root, target):
    (root / "a" / "loop").symlink_to(target, target_is_directory=True)
    with pytest.warns(UserWarning, match=r"Did not follow 1 links .*: a/loop/\. Remove") as caught:
        data = load_image_folder(root)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert names_of(data, root) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]


def test_loops_over_two_links_and_beside_the_classes_end(root):
    (root / "a" / "to_b").symlink_to("../b", target_is_directory=True)
    (root / "b" / "to_a").symlink_to("../a", target_is_directory=True)
    (root / "self").symlink_to(".", target_is_directory=True)
    with pytest.warns(UserWarning, match=r"Did not follow 3 links .*a/to_b/to_a/, b/to_a/to_b/, self/"):
        data = load_image_folder(root)
    assert data.target_names.tolist() == ["a", "b"]
    assert data.target.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("place", ["a/gone", "a/gone.png", "gone"])
def test_a_link_to_nothing_is_named(root, place):
    (root / place).symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"{place}: link to a file or folder that does not exist"):
        load_image_folder(root)
    with pytest.warns(UserWarning, match=f"Left out 1 .*\n  {place}: link"):
        assert len(load_image_folder(root, on_error="warn").images) == 4


def test_a_link_to_itself_is_named(root):
    (root / "a" / "me").symlink_to("me")
    with pytest.raises(ValueError, match="a/me: link"):
        load_image_folder(root)


def open_to_all(*folders):
    """Pytest's folders are its user's alone."""
    for folder in folders:
        if folder.stat().st_mode & 0o055 != 0o055:
            folder.chmod(folder.stat().st_mode | 0o055)


@pytest.mark.skipif(os.name == "nt", reason="permissions are a matter of POSIX systems")
@pytest.mark.parametrize("mode", [0o000, 0o300])
@pytest.mark.parametrize("place", ["a/sub", "c"])
def test_a_folder_without_permission_is_named(root, place, mode):
    save(root / place / "9.png")
    open_to_all(root, *root.parents)
    (root / place).chmod(mode)
    with nobody():
        with pytest.raises(ValueError, match=f"{place}/: folder that cannot be listed: Perm") as caught:
            load_image_folder(root)
        assert "without an image" not in str(caught.value)
        with pytest.warns(UserWarning, match=f"Left out 1 .*\n  {place}/: folder that cannot be listed"):
            assert len(load_image_folder(root, on_error="warn").images) == 4
    (root / place).chmod(0o700)


@pytest.mark.skipif(os.name == "nt", reason="permissions are a matter of POSIX systems")
def test_a_root_without_permission_is_named(root):
    open_to_all(*root.parents)
    root.chmod(0o000)
    with nobody(), pytest.raises(PermissionError, match="root"):
        load_image_folder(root)
    root.chmod(0o700)


def test_images_of_other_formats_are_counted_in_a_warning(root):
    for name in ("a/x.webp", "a/y.GIF", "b/more/z.gif", "b/w.npy", "b/notes.txt", "b/.hidden.gif"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"something")
    expected = r"Passed over 4 image files .*\(2 \.gif, 1 \.npy, 1 \.webp\), such as a/x\.webp\. Convert"
    with pytest.warns(UserWarning, match=expected) as caught:
        data = load_image_folder(root)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(data.images) == 4


def test_a_class_of_other_formats_only_is_named(root):
    (root / "c").mkdir()
    (root / "c" / "0.webp").write_bytes(b"something")
    with (
        pytest.warns(UserWarning, match=r"\(1 \.webp\)"),
        pytest.raises(ValueError, match="c/: class folder without an image that can be read"),
    ):
        load_image_folder(root)


@pytest.mark.parametrize("suffix", [".jfif", ".JPE"])
def test_other_suffixes_of_jpeg(root, suffix):
    Image.fromarray(np.full((8, 8), 70, np.uint8)).save(root / "a" / f"9{suffix}", format="JPEG")
    assert len(load_image_folder(root).images) == 5


@pytest.mark.parametrize("parts", [("train", "val"), ("Train", "test"), ("training", "validation", "test")])
def test_the_root_of_a_data_set_already_split_is_refused(tmp_path, parts):
    save(*(tmp_path / part / label / "0.png" for part in parts for label in "ab"))
    train = str(tmp_path / parts[0])
    with pytest.raises(ValueError, match="these are parts of a data set") as caught:
        load_image_folder(tmp_path)
    assert f"load_image_folder({train!r})" in str(caught.value)
    assert load_image_folder(train).target_names.tolist() == ["a", "b"]


@pytest.mark.parametrize(
    "files",
    [["train/0.png", "test/0.png"], ["train/a/0.png", "lorry/b/0.png"], ["val/a/0.png", "test/b/0.png"]],
)
def test_classes_may_be_named_like_parts(tmp_path, files):
    save(*(tmp_path / file for file in files))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_image_folder(tmp_path).target_names) == 2
