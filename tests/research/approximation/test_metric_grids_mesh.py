"""Meshes and shapes: distances, signs, surface points, overlap, bad files."""

import warnings

import numpy as np
import pytest

from research.approximation.metric_grids import mesh as meshes
from research.approximation.metric_grids import sdf
from research.approximation.metric_grids.mesh import Mesh, load_mesh
from research.approximation.metric_grids.shapes import SHAPES, Csg, Shape, Torus


def torus_mesh(around: int = 60, across: int = 30, torus: Torus = Torus()) -> Mesh:  # noqa: B008
    """The torus in triangles that face outwards."""
    u, v = np.meshgrid(np.arange(around), np.arange(across), indexing="ij")
    a, b = 2 * np.pi * u / around, 2 * np.pi * v / across
    ring = torus.major + torus.minor * np.cos(b)
    corners = np.stack([ring * np.cos(a), ring * np.sin(a), torus.minor * np.sin(b)], -1)
    index = lambda i, j: (i % around) * across + j % across
    quads = np.stack([index(u, v), index(u + 1, v), index(u + 1, v + 1), index(u, v + 1)], -1)
    quads = quads.reshape(-1, 4)
    return Mesh(corners.reshape(-1, 3), np.concatenate([quads[:, :3], quads[:, [0, 2, 3]]]))


def soup(count: int = 50) -> Mesh:
    """Triangles anywhere, of very different sizes."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(-1, 1, (count, 1, 3)) + rng.normal(size=(count, 3, 3)) * rng.exponential(
        0.3, (count, 1, 1)
    )
    return Mesh(corners.reshape(-1, 3), np.arange(3 * count).reshape(-1, 3))


def anywhere(count: int = 400, half: float = 1.0) -> np.ndarray:
    return np.random.default_rng(1).uniform(-half, half, (count, 3))


def write(path, text: str):
    path.write_text(text)
    return path


@pytest.mark.parametrize("mesh", [torus_mesh(12, 6), soup(), soup(1), soup(9)])
def test_distances_equal_dense_samples_of_every_triangle(mesh: Mesh):
    points = anywhere(30)
    steps = np.linspace(0, 1, 25)
    u, v = (g.reshape(-1, 1) for g in np.meshgrid(steps, steps))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    a, b, c = (mesh.corners[:, None, i] for i in range(3))
    surface = (a + u[None] * (b - a) + v[None] * (c - a)).reshape(-1, 3)
    nearest = np.linalg.norm(points[:, None] - surface[None], axis=-1).min(1)
    found = mesh.unsigned_distance(points)
    longest = np.linalg.norm(np.concatenate([b - a, c - a]), axis=-1).max()
    assert (found <= nearest + 1e-12).all()
    assert (nearest - found <= longest / 24).all()


def test_the_tree_equals_all_pairs():
    mesh, points = soup(300), anywhere(300)
    pairs = meshes._triangle_distance(points[:, None], mesh.corners[None])
    np.testing.assert_allclose(mesh.unsigned_distance(points), pairs.min(1), rtol=1e-12)
    whole = meshes._solid_angle(points[:, None], mesh.corners[None]).sum(1) / (4 * np.pi)
    found = mesh.winding(points)
    np.testing.assert_allclose(found, whole, atol=0.05)
    # The sign is decided by the sum over all triangles.
    assert ((np.abs(found) > 0.5) == (np.abs(whole) > 0.5)).all()


def test_a_closed_mesh_has_the_formula_s_distances():
    torus, mesh, points = Torus(), torus_mesh(120, 60), anywhere(3000)
    assert mesh.boundary_edges == 0
    exact = torus.distance(points)
    np.testing.assert_allclose(mesh.distance(points), exact, atol=2e-3)
    clear = np.abs(exact) > 2e-3
    assert ((mesh.distance(points) < 0) == (exact < 0))[clear].all()
    winding = mesh.winding(points)[clear]
    np.testing.assert_allclose(winding, exact[clear] < 0, atol=0.05)


def test_triangles_that_face_inwards_give_the_same_signs():
    mesh, points = torus_mesh(30, 15), anywhere()
    turned = Mesh(mesh.vertices, mesh.triangles[:, ::-1])
    np.testing.assert_allclose(turned.distance(points), mesh.distance(points), rtol=1e-9)


def test_an_open_mesh_is_closed_by_its_winding_number(tmp_path):
    mesh, points = torus_mesh(40, 20).scaled(), anywhere(2000)
    lines = [f"v {x} {y} {z}" for x, y, z in mesh.vertices.tolist()]
    faces = [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in mesh.triangles.tolist()]
    closed = load_mesh(write(tmp_path / "closed.obj", "\n".join(lines + faces)))
    np.testing.assert_allclose(closed.vertices, mesh.vertices, atol=1e-9)
    with pytest.warns(UserWarning, match=r"hole.obj is open \(4 boundary edges\)"):
        quad = {0, len(faces) // 2}
        kept = [face for i, face in enumerate(faces) if i not in quad]
        hole = load_mesh(write(tmp_path / "hole.obj", "\n".join(lines + kept)))
    signs = hole.distance(points) < 0
    assert np.mean(signs != (closed.distance(points) < 0)) < 0.002


def test_obj_files_of_every_form(tmp_path):
    text = """# comment
o cube
v -1 -1 -1
v 1 -1 -1 0.5 0.5 0.5
v 1 1 -1
v -1 1 -1
vt 0 0
v -1 -1 1
v 1 -1 1
v 1 1 1
v -1 1 1
f 4/1/1 3/1 2 1
f -4 -3 -2 -1
f 1//2 2//2 6//2 5//2
f 2 3 7 6
f 3 4 8 7
f 4 1 5 8
"""
    cube = load_mesh(write(tmp_path / "cube.OBJ", text))
    assert len(cube.triangles) == 12 and cube.boundary_edges == 0
    np.testing.assert_allclose(np.abs(cube.vertices), 0.9)
    found = cube.distance(np.asarray([[0.0, 0, 0], [1.0, 0, 0], [0.5, 0.2, -0.1], [1.0, 1, 1]]))
    np.testing.assert_allclose(found, [-0.9, 0.1, -0.4, 0.1 * np.sqrt(3)], atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the mesh is empty: it has no faces"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0", "the mesh is empty: it has no faces"),
        ("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3", "all its faces have no area"),
        ("v 0 0 0\nv 1 0 0\nf 1 2 3", "names vertex 3 or one below 1, but there are 2"),
        ("v 0 0 0\nf 1 -2 1", "or one below 1"),
        ("v 0 0\n", "line 1 cannot be read: fewer than three"),
        ("v 0 0 zero\n", "line 1 cannot be read"),
        ("v 0 0 0\nf 1 1\n", "line 2 cannot be read: a face needs three"),
        ("v 0 0 0\nf 0 1 1\n", "numbered from 1"),
        ("v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3", "not finite"),
    ],
)
def test_damaged_meshes_are_refused(tmp_path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_mesh(write(tmp_path / "bad.obj", text))


def test_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no OBJ file: convert"):
        load_mesh(write(tmp_path / "mesh.ply", ""))
    with pytest.raises(FileNotFoundError, match="there is no mesh"):
        sdf.load_shape(str(tmp_path / "none.obj"))
    with pytest.raises(ValueError, match="unknown shape 'sphere': choose torus, csg"):
        sdf.load_shape("sphere")


def test_mesh_surface_points_are_uniform_by_area():
    mesh = torus_mesh(100, 50)
    points = mesh.surface(20_000, np.random.default_rng(0))
    assert mesh.unsigned_distance(points[:500]).max() < 1e-12
    # Pappus: the outer half of a torus has pi/2 + minor/major times the share of the inner one.
    outer = np.hypot(points[:, 0], points[:, 1]) > 0.55
    ratio = 0.25 / 0.55 * 2 / np.pi
    assert outer.mean() == pytest.approx((1 + ratio) / 2, abs=0.012)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_by_formula(name: str):
    shape = sdf.load_shape(name)
    assert isinstance(shape, Shape)
    points = shape.surface(3000, np.random.default_rng(0))
    assert points.shape == (3000, 3)
    assert np.abs(shape.distance(points)).max() < 1e-6
    far = anywhere(2000)
    step = 1e-4 * np.random.default_rng(2).normal(size=far.shape)
    slope = np.abs(shape.distance(far + step) - shape.distance(far))
    assert (slope <= np.linalg.norm(step, axis=-1) * (1 + 1e-6)).all()
    inside = shape.distance(far) < 0
    assert 0.02 < inside.mean() < 0.4


def test_torus_surface_points_are_uniform_by_area():
    points = Torus().surface(20_000, np.random.default_rng(0))
    outer = np.hypot(points[:, 0], points[:, 1]) > 0.55
    assert outer.mean() == pytest.approx((1 + 0.25 / 0.55 * 2 / np.pi) / 2, abs=0.015)


def test_the_csg_shape_has_its_parts():
    shape = Csg()
    where = np.asarray(
        [[0.5, 0.5, 0.5], [0.55, 0.0, 0.4], [0, 0, 0.85], [0.3, 0, 0.3], [0, 0, 0.95]]
    )
    assert (shape.distance(where) < 0).tolist() == [True, False, True, False, False]


def test_training_points():
    shape = Torus()
    points, values = sdf.training_points(shape, 3, 800, np.random.default_rng(0))
    assert points.shape == (3, 800, 3) and values.shape == (3, 800, 1)
    assert (values[:, :400] == 0).all()
    exact = shape.distance(points.reshape(-1, 3).astype(np.float64)).reshape(3, 800)
    np.testing.assert_allclose(values[..., 0], exact, atol=1e-6)
    near, rest = exact[:, 400:700], exact[:, 700:]
    assert np.std(near) == pytest.approx(sdf.NOISE, rel=0.15)
    assert np.std(rest) > 10 * sdf.NOISE
    assert np.abs(points).max() <= 1
    with pytest.raises(ValueError, match="choose a multiple of 8"):
        sdf.training_points(shape, 1, 12, np.random.default_rng(0))


def test_overlap_and_cube():
    a, b = np.asarray([1, 1, 0, 0], bool), np.asarray([1, 0, 1, 0], bool)
    assert sdf.overlap(a, b) == pytest.approx(1 / 3)
    assert sdf.overlap(a & ~a, a & ~a) == 1.0
    cube = sdf.cube(3)
    assert cube.shape == (27, 3) and cube.min() == -1 and cube.max() == 1
    np.testing.assert_array_equal(cube[:4], [[-1, -1, -1], [-1, -1, 0], [-1, -1, 1], [-1, 0, -1]])
    with pytest.raises(ValueError, match="at least 2 points"):
        sdf.cube(1)


def test_closed_meshes_do_not_warn(tmp_path):
    lines = ["v 0 0 0", "v 1 0 0", "v 0 1 0", "v 0 0 1", "f 1 3 2", "f 1 2 4", "f 1 4 3", "f 2 3 4"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mesh = load_mesh(write(tmp_path / "closed.obj", "\n".join(lines)))
    assert mesh.distance(mesh.corners.mean((0, 1))[None]) < 0
