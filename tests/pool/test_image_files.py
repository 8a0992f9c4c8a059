"""NIfTI, MetaImage and NRRD as people have them: their own voxels at their own size, or the reason why not."""

from __future__ import annotations

import bz2
import gzip
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import phantoms
import pytest
import SimpleITK as sitk

from nnunetv2_misfm.pool.inspection import find_volumes
from nnunetv2_misfm.pool.reading import read_volume
from nnunetv2_misfm.pool.volume_files import VolumeProblem

VOXELS = phantoms.mr()
SPACING = (2.5, 0.8, 0.7)
RAW = np.ascontiguousarray(VOXELS, "<i2").tobytes()
X, Y, Z = 28, 24, 20
MHD = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n{more}"
    "ElementSpacing = 0.7 0.8 2.5\nDimSize = 28 24 20\nElementType = MET_SHORT\nElementDataFile = {data}\n"
)
NRRD = (
    "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 28 24 20\n"
    "space directions: (0.7,0,0) (0,0.8,0) (0,0,2.5)\nendian: little\nencoding: {encoding}\nspace origin: (0,0,0)\n"
    "{more}\n"
)


def read(path: Path) -> tuple[np.ndarray, tuple[float, ...], str]:
    """Voxels in the order in which they are stored, spacing, and what was mended."""
    found = find_volumes([path])
    if not found.volumes:
        raise VolumeProblem(found.left_out[0].reason)
    voxels, spacing, mended = read_volume(found.volumes[0], turn_upright=False)
    return voxels[0], spacing, mended


def patched(path: Path, offset: int, layout: str, *values: float) -> Path:
    """A NIfTI file with other values in its header."""
    content = bytearray(phantoms.write(path, VOXELS, SPACING).read_bytes())
    struct.pack_into(layout, content, offset, *values)
    path.write_bytes(content)
    return path


def text_file(path: Path, header: str, content: bytes = b"") -> Path:
    path.write_bytes(header.encode() + content)
    return path


@pytest.mark.parametrize("names", [("A.nii", "A.nii.gz"), ("A.nrrd", "A.nhdr"), ("A.mha", "A.mhd")])
def test_files_of_one_name_keep_their_own_voxels(tmp_path: Path, names: tuple[str, str]) -> None:
    images = {name: phantoms.mr(seed, (20, 24, 28 + 4 * seed)) for seed, name in enumerate(names)}
    for name, voxels in images.items():
        phantoms.write(tmp_path / name, voxels, SPACING)
    volumes = find_volumes([tmp_path]).volumes
    assert len(volumes) == 2
    for volume in volumes:
        voxels, _, _ = read_volume(volume, turn_upright=False)
        np.testing.assert_array_equal(voxels[0], images[Path(volume.source).name])


def test_a_damaged_file_does_not_borrow_the_voxels_of_its_neighbour(tmp_path: Path) -> None:
    phantoms.write(tmp_path / "A.nii", VOXELS, SPACING)
    (tmp_path / "A.nii.gz").write_bytes(b"not an image at all")
    (left_out,) = find_volumes([tmp_path]).left_out
    assert left_out.source.endswith("A.nii.gz")


@pytest.mark.parametrize("slope", [0.0, -0.0])
def test_a_slope_of_0_scales_nothing(tmp_path: Path, slope: float) -> None:
    path = patched(tmp_path / "a.nii", 112, "<ff", slope, -1024)
    np.testing.assert_array_equal(read(path)[0], VOXELS)


def test_slope_and_intercept_are_applied_once(tmp_path: Path) -> None:
    path = patched(tmp_path / "a.nii", 112, "<ff", 0.5, -1024)
    np.testing.assert_array_equal(read(path)[0], VOXELS * 0.5 - 1024)
    assert read(path)[0].dtype == np.float32


@pytest.mark.parametrize(("unit", "factor"), [(1, 1000), (2, 1), (3, 0.001), (0, 1)])
def test_a_nifti_in_metres_or_micrometres_is_in_mm(tmp_path: Path, unit: int, factor: float) -> None:
    affine = np.diag([0.7 / factor, 0.8 / factor, 2.5 / factor, 1])
    image = nibabel.Nifti1Image(VOXELS.T, affine)
    image.header["xyzt_units"] = unit
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert read(tmp_path / "a.nii.gz")[1] == pytest.approx(SPACING, rel=1e-5)


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_axes_point_where_itk_and_nibabel_say(tmp_path: Path, codes: tuple[int, int]) -> None:
    """The sform, then the qform, then, without either, the axes as stored (NIfTI-1, method 1)."""
    turned = np.array([[0, 0, -2.5, 5], [0.7, 0, 0, 6], [0, 0.8, 0, 7], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(VOXELS.T, turned)
    image.set_qform(turned, codes[0])
    image.set_sform(turned, codes[1])
    nibabel.save(image, tmp_path / "a.nii")
    (volume,) = find_volumes([tmp_path / "a.nii"]).volumes
    expected = "ASL" if any(codes) else "RAS"
    assert volume.orientation == expected
    if any(codes):
        upright = nibabel.as_closest_canonical(nibabel.load(tmp_path / "a.nii"))
        np.testing.assert_array_equal(read_volume(volume)[0][0], upright.get_fdata().T)


def sheared(path: Path, shear: float, qform: bool = False) -> Path:
    affine = np.diag([0.7, 0.8, 2.5, 1.0])
    affine[1, 2] = shear * 2.5
    image = nibabel.Nifti1Image(VOXELS.T, affine)
    image.set_sform(affine, 1)
    image.set_qform(np.diag([0.7, 0.8, float(image.header["pixdim"][3]), 1]), int(qform))
    nibabel.save(image, path)
    return path


def test_a_slight_shear_changes_nothing(tmp_path: Path) -> None:
    voxels, spacing, mended = read(sheared(tmp_path / "a.nii", 0.002))
    np.testing.assert_array_equal(voxels, VOXELS)
    assert spacing == pytest.approx(SPACING, rel=1e-4)
    assert mended == ""


def test_the_shear_of_a_tilted_gantry_is_straightened(tmp_path: Path) -> None:
    voxels, spacing, mended = read(sheared(tmp_path / "a.nii", 0.8 / 2.5))  # one row per slice
    assert "off by 17.7°" in mended
    assert spacing == pytest.approx(SPACING, rel=1e-4)
    assert voxels.shape == (20, 24 + 19, 28)
    for n in range(20):
        np.testing.assert_allclose(voxels[n, n : n + 24], VOXELS[n], atol=0.1)


def test_a_qform_at_right_angles_is_taken_before_a_sheared_sform(tmp_path: Path) -> None:
    """As after a registration to an atlas: the sform says where the atlas is, the qform where the scanner measured."""
    voxels, _, mended = read(sheared(tmp_path / "a.nii", 0.5, qform=True))
    np.testing.assert_array_equal(voxels, VOXELS)
    assert mended == ""


def test_a_header_with_two_voxel_sizes_is_left_out(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VOXELS.T, np.diag([0.7, 0.8, 2.5, 1]))
    image.header["pixdim"][1:4] = 1
    image.header["qform_code"] = 0
    image.to_filename(tmp_path / "a.nii")
    with pytest.raises(VolumeProblem, match="contradicts itself: voxels of 1 x 1 x 1 mm"):
        read(tmp_path / "a.nii")


WHOLE: dict[str, Callable[[Path], Path]] = {
    "MHD list": lambda folder: text_file(
        folder / "a.mhd",
        MHD.format(more="", data="LIST") + "".join(f"{n}.raw\n" for n in range(Z) if slices(folder)),
    ),
    "MHD pattern": lambda folder: (
        slices(folder) and text_file(folder / "a.mhd", MHD.format(more="", data="%d.raw 0 19 1"))
    ),
    "MHD big endian": lambda folder: text_file(
        folder / "a.mha",
        MHD.format(more="", data="LOCAL").replace("MSB = False", "MSB = True"),
        VOXELS.astype(">i2").tobytes(),
    ),
    "MHD header before the voxels": lambda folder: (
        text_file(folder / "a.raw", "x" * 77, RAW)
        and text_file(folder / "a.mhd", MHD.format(more="HeaderSize = -1\n", data="a.raw"))
    ),
    "MHA numbers": lambda folder: text_file(
        folder / "a.mha",
        MHD.format(more="", data="LOCAL").replace("BinaryData = True", "BinaryData = False"),
        " ".join(map(str, VOXELS.ravel())).encode(),
    ),
    "MHD zlib": lambda folder: (
        text_file(folder / "a.zraw", "", zlib.compress(RAW))
        and text_file(folder / "a.mhd", MHD.format(more="CompressedData = True\n", data="a.zraw"))
    ),
    "NRRD raw": lambda folder: text_file(folder / "a.nrrd", NRRD.format(encoding="raw", more=""), RAW),
    "NRRD gzip": lambda folder: text_file(folder / "a.nrrd", NRRD.format(encoding="gzip", more=""), gzip.compress(RAW)),
    "NRRD bzip2": lambda folder: text_file(folder / "a.nrrd", NRRD.format(encoding="bz2", more=""), bz2.compress(RAW)),
    "NRRD text, big-endian": lambda folder: text_file(
        folder / "a.nrrd",
        NRRD.format(encoding="ascii", more="").replace("endian: little", "endian: big"),
        " ".join(map(str, VOXELS.ravel())).encode(),
    ),
    "NRRD hex": lambda folder: text_file(folder / "a.nrrd", NRRD.format(encoding="hex", more=""), RAW.hex().encode()),
    "NRRD numbers": lambda folder: text_file(
        folder / "a.nrrd", NRRD.format(encoding="txt", more=""), " ".join(map(str, VOXELS.ravel())).encode()
    ),
    "NRRD list": lambda folder: text_file(
        folder / "a.nhdr",
        NRRD.format(encoding="raw", more="data file: LIST").rstrip()
        + "\n"
        + "".join(f"{n}.raw\n" for n in range(Z) if slices(folder)),
    ),
    "NRRD detached, skipping": lambda folder: (
        text_file(folder / "a.raw", "line\n12345", RAW)
        and text_file(
            folder / "a.nhdr", NRRD.format(encoding="raw", more="line skip: 1\nbyte skip: 5\ndata file: a.raw")
        )
    ),
    "NRRD detached, at the end": lambda folder: (
        text_file(folder / "a.raw", "x" * 33, RAW)
        and text_file(folder / "a.nhdr", NRRD.format(encoding="raw", more="byte skip: -1\ndata file: a.raw"))
    ),
    "NIfTI": lambda folder: phantoms.write(folder / "a.nii", VOXELS, SPACING),
    "NIfTI big endian": lambda folder: big_endian(folder / "a.nii"),
    "NIfTI-2": lambda folder: saved(nibabel.Nifti2Image(VOXELS.T, np.diag([-0.7, -0.8, 2.5, 1])), folder / "a.nii.gz"),
    "NIfTI in several gzip members": lambda folder: rezipped(folder / "a.nii.gz"),
}


def slices(folder: Path) -> bool:
    for n in range(Z):
        (folder / f"{n}.raw").write_bytes(RAW[n * X * Y * 2 :][: X * Y * 2])
    return True


def saved(image: nibabel.Nifti1Image, path: Path) -> Path:
    nibabel.save(image, path)
    return path


def big_endian(path: Path) -> Path:
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    return saved(nibabel.Nifti1Image(VOXELS.T, np.diag([-0.7, -0.8, 2.5, 1]), header), path)


def rezipped(path: Path) -> Path:
    plain = phantoms.write(path.with_suffix(""), VOXELS, SPACING)
    content = plain.read_bytes()
    plain.unlink()
    path.write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]))
    return path


@pytest.mark.parametrize("kind", WHOLE)
def test_every_way_of_storing_voxels_is_read(tmp_path: Path, kind: str) -> None:
    voxels, spacing, _ = read(WHOLE[kind](tmp_path))
    np.testing.assert_array_equal(voxels, VOXELS)
    assert spacing == pytest.approx(SPACING, rel=1e-5)


@pytest.mark.parametrize("kind", WHOLE)
def test_voxels_that_are_missing_are_found_out(tmp_path: Path, kind: str) -> None:
    path = WHOLE[kind](tmp_path)
    holds_voxels = max(tmp_path.iterdir(), key=lambda file: (file.stat().st_size, file.name))
    content = holds_voxels.read_bytes()
    holds_voxels.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(VolumeProblem, match="cut short|failed to fseek"):
        read(path)


@pytest.mark.parametrize("kind", ["MHD list", "MHD pattern", "NRRD list", "MHD zlib"])
def test_a_missing_voxel_file_is_named(tmp_path: Path, kind: str) -> None:
    path = WHOLE[kind](tmp_path)
    name = "a.zraw" if kind == "MHD zlib" else "7.raw"
    (tmp_path / name).unlink()
    with pytest.raises(VolumeProblem, match=f"unreadable: .*{name}"):
        read(path)


def test_a_list_of_too_few_files_is_cut_short(tmp_path: Path) -> None:
    slices(tmp_path)
    text = MHD.format(more="", data="LIST") + "".join(f"{n}.raw\n" for n in range(15))
    with pytest.raises(VolumeProblem, match="cut short: 20160 of 26880 bytes"):
        read(text_file(tmp_path / "a.mhd", text))


UNKNOWN_SIZE = {
    "MHA": ("a.mha", MHD.format(more="", data="LOCAL").replace("ElementSpacing = 0.7 0.8 2.5\n", "")),
    "NRRD": (
        "a.nrrd",
        NRRD.format(encoding="raw", more="").replace("space directions: (0.7,0,0) (0,0.8,0) (0,0,2.5)\n", ""),
    ),
    "NRRD nan": (
        "a.nrrd",
        NRRD.format(encoding="raw", more="spacings: nan nan nan")
        .replace("space directions: (0.7,0,0) (0,0.8,0) (0,0,2.5)\n", "")
        .replace("space: left-posterior-superior\n", "")
        .replace("space origin: (0,0,0)\n", ""),
    ),
    "NRRD in unknown units": (
        "a.nrrd",
        NRRD.format(encoding="raw", more='space units: "furlong" "furlong" "furlong"'),
    ),
}


@pytest.mark.parametrize("kind", UNKNOWN_SIZE)
def test_a_voxel_size_that_is_not_given_is_not_made_up(tmp_path: Path, kind: str) -> None:
    name, header = UNKNOWN_SIZE[kind]
    with pytest.raises(VolumeProblem, match="the size of its voxels is not known"):
        read(text_file(tmp_path / name, header if header.endswith(("\n\n", "LOCAL\n")) else f"{header}\n", RAW))


@pytest.mark.parametrize(
    ("name", "header"),
    [
        (
            "a.nrrd",
            NRRD.format(encoding="raw", more='space units: "um" "um" "um"').replace(
                "(0.7,0,0) (0,0.8,0) (0,0,2.5)", "(700,0,0) (0,800,0) (0,0,2500)"
            ),
        ),
        ("a.mha", MHD.format(more="DistanceUnits = um\n", data="LOCAL").replace("0.7 0.8 2.5", "700 800 2500")),
        ("a.mha", MHD.format(more="", data="LOCAL").replace("ElementSpacing", "ElementSize")),
    ],
)
def test_other_units_and_names_of_the_voxel_size_are_understood(tmp_path: Path, name: str, header: str) -> None:
    end = "\n" if name.endswith(".nrrd") else ""
    assert read(text_file(tmp_path / name, header + end, RAW))[1] == pytest.approx(SPACING)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_every_type_of_voxel_is_read_as_itk_reads_it(tmp_path: Path, dtype: str, ending: str) -> None:
    voxels = (VOXELS % 120).astype(dtype)
    path = phantoms.write(tmp_path / f"a{ending}", voxels, SPACING)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32)
    np.testing.assert_array_equal(read(path)[0], expected)


@pytest.mark.parametrize(("offset", "value"), [(76, 0.0), (264, 1.00001), (80, -0.7)])
def test_a_quaternion_is_read_as_nifti_defines_it(tmp_path: Path, offset: int, value: float) -> None:
    """A qfac of 0, a quaternion that rounding made longer than 1, a negative voxel size: all by the standard."""
    path = patched(tmp_path / "a.nii", 254, "<h", 0)  # the qform alone; it turns x and y, as LPS
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, offset, value)
    path.write_bytes(content)
    (volume,) = find_volumes([path]).volumes
    assert volume.orientation == "LPS"


@pytest.mark.parametrize("before", [b"", b"12345"])
@pytest.mark.parametrize("after", [b"", b"tail"])
@pytest.mark.parametrize("kind", ["MHD", "NRRD"])
def test_bytes_around_the_slices_of_several_files_are_no_voxels(
    tmp_path: Path, kind: str, before: bytes, after: bytes
) -> None:
    for n in range(Z):
        (tmp_path / f"{n}.raw").write_bytes(before + RAW[n * X * Y * 2 :][: X * Y * 2] + after)
    if kind == "MHD":
        more = f"HeaderSize = {len(before)}\n"
        path = text_file(tmp_path / "a.mhd", MHD.format(more=more, data="%d.raw 0 19 1"))
    else:
        more = f"byte skip: {len(before)}\ndata file: %d.raw 0 19 1"
        path = text_file(tmp_path / "a.nhdr", NRRD.format(encoding="raw", more=more))
    np.testing.assert_array_equal(read(path)[0], VOXELS)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_bytes_after_compressed_voxels_are_ignored(tmp_path: Path, ending: str) -> None:
    path = phantoms.write(tmp_path / f"a{ending}", VOXELS, SPACING)
    path.write_bytes(path.read_bytes() + b"and more")
    np.testing.assert_array_equal(read(path)[0], VOXELS)


def test_one_damaged_header_stops_nothing(tmp_path: Path) -> None:
    phantoms.write(tmp_path / "good.nii", VOXELS, SPACING)
    patched(tmp_path / "offset nan.nii", 108, "<f", np.nan)
    patched(tmp_path / "offset inf.nii", 108, "<f", np.inf)
    patched(tmp_path / "no axes.nii", 40, "<h", 0)
    text_file(tmp_path / "percent.mhd", MHD.format(more="", data="50%_s%02d.raw 0 23 1"))
    text_file(tmp_path / "skip.nrrd", NRRD.format(encoding="raw", more="line skip: 1.5\n"))
    text_file(tmp_path / "nan.nrrd", NRRD.format(encoding="raw", more="").replace("(0,0,2.5)", "(nan,nan,nan)"), RAW)
    Path(f"{tmp_path}/caf\udce9.nrrd").write_bytes(NRRD.format(encoding="raw", more="").encode() + RAW)
    found = find_volumes([tmp_path])
    assert [Path(volume.source).name for volume in found.volumes] == ["good.nii"]
    assert len(found.left_out) == 7 and all(left_out.reason for left_out in found.left_out)
