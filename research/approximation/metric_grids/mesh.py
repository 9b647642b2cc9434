"""Triangle meshes: reading OBJ files, exact distances, inside and outside by winding number.

Sign: Jacobson et al., "Robust Inside-Outside Segmentation using Generalized Winding Numbers" (ACM
Transactions on Graphics, 2013), with far triangles taken together as one dipole as in Barill et
al., "Fast Winding Numbers for Soups and Clouds" (2018), whose higher-order terms are left out.
"""

import dataclasses
import functools
import itertools
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import KDTree

LEAF = 8
"""Triangles of a leaf, at most."""

FAR = 3.0
"""A group of triangles this many radii away counts as one dipole."""

Points = Float[np.ndarray, "n 3"]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Triangles by their corners; degenerate ones are dropped.

    Raises:
        ValueError: no triangle with an area, indices out of range, or coordinates not finite.
    """

    vertices: Float[np.ndarray, "v 3"]
    triangles: Int[np.ndarray, "t 3"]

    def __post_init__(self):
        vertices = np.asarray(self.vertices, np.float64)
        triangles = np.asarray(self.triangles, np.int64)
        if triangles.size == 0:
            raise ValueError("the mesh is empty: it has no faces.")
        if triangles.min() < 0 or triangles.max() >= len(vertices):
            raise ValueError(
                f"a face names vertex {triangles.max() + 1} or one below 1, but there are "
                f"{len(vertices)}: the mesh is damaged."
            )
        if not np.isfinite(vertices[triangles]).all():
            raise ValueError("the mesh has coordinates that are not finite: repair it first.")
        corners = vertices[triangles]
        size = np.ptp(corners.reshape(-1, 3), axis=0).max()
        twice_area = np.linalg.norm(_normals(corners), axis=-1)
        triangles = triangles[twice_area > 1e-14 * size**2]
        if not len(triangles):
            raise ValueError("the mesh is empty: all its faces have no area.")
        object.__setattr__(self, "vertices", vertices)
        object.__setattr__(self, "triangles", triangles)

    @functools.cached_property
    def corners(self) -> Float[np.ndarray, "t 3 3"]:
        """The three corners of every triangle."""
        return self.vertices[self.triangles]

    @functools.cached_property
    def boundary_edges(self) -> int:
        """Edges of exactly one triangle: 0 for a closed mesh."""
        edges = np.concatenate([self.triangles[:, [i, (i + 1) % 3]] for i in range(3)])
        _, counts = np.unique(np.sort(edges, axis=1), axis=0, return_counts=True)
        return int(np.sum(counts == 1))

    @functools.cached_property
    def _tree(self) -> "_Tree":
        return _Tree.build(self.corners)

    def scaled(self, half: float = 0.9) -> "Mesh":
        """The mesh moved and scaled so that its box is centred and its longest side is 2 half."""
        used = self.corners.reshape(-1, 3)
        low, high = used.min(axis=0), used.max(axis=0)
        factor = 2 * half / (high - low).max()
        return Mesh((self.vertices - (low + high)[None] / 2) * factor, self.triangles)

    def surface(self, count: int, rng: np.random.Generator) -> Points:
        """Points uniform by area."""
        area = np.linalg.norm(_normals(self.corners), axis=-1)
        chosen = self.corners[rng.choice(len(area), count, p=area / area.sum())]
        u, v = rng.random((2, count, 1))
        flip = u + v > 1
        u, v = np.where(flip, 1 - u, u), np.where(flip, 1 - v, v)
        a, b, c = (chosen[:, i] for i in range(3))
        return a + u * (b - a) + v * (c - a)

    def distance(self, points: Points) -> Float[np.ndarray, " n"]:
        """Exact distance to the nearest triangle, negative where :meth:`winding` exceeds 1/2.

        Triangles may face inwards or outwards, as long as they agree.
        """
        sign = np.where(np.abs(self.winding(points)) > 0.5, -1.0, 1.0)
        return sign * self.unsigned_distance(points)

    def unsigned_distance(self, points: Points) -> Float[np.ndarray, " n"]:
        """Exact distance to the nearest triangle."""
        nearest = KDTree(self.corners.reshape(-1, 3))
        out = np.empty(len(points))
        for rows in _chunks(len(points)):
            bound, _ = nearest.query(points[rows])
            out[rows] = self._tree.unsigned_distance(points[rows], bound)
        return out

    def winding(self, points: Points) -> Float[np.ndarray, " n"]:
        """Generalised winding number: 1 (or -1) inside and 0 outside of a closed mesh.

        Groups of far triangles count as dipoles; where that could decide the sign (within 0.2 of
        1/2) the number is summed again over all triangles.
        """
        out = np.empty(len(points))
        for rows in _chunks(len(points)):
            out[rows] = self._tree.winding(points[rows])
        doubtful = np.flatnonzero(np.abs(np.abs(out) - 0.5) < 0.2)
        step = max(2_000_000 // len(self.corners), 1)
        for start in range(0, len(doubtful), step):
            rows = doubtful[start : start + step]
            each = _solid_angle(points[rows][:, None], self.corners[None])
            out[rows] = each.sum(axis=1) / (4 * np.pi)
        return out


@dataclasses.dataclass(frozen=True)
class _Tree:
    """A complete binary tree over triangles, node i with children 2i + 1 and 2i + 2.

    ``leaves`` are padded with a triangle's repetition, whose ``weight`` is 0.
    """

    centre: np.ndarray  # (nodes, 3)
    radius: np.ndarray  # (nodes,)
    dipole: np.ndarray  # (nodes, 3): sum of the area vectors
    leaves: np.ndarray  # (leaves, size, 3, 3)
    weight: np.ndarray  # (leaves, size)

    @property
    def first_leaf(self) -> int:
        return len(self.leaves) - 1

    @classmethod
    def build(cls, corners: np.ndarray) -> "_Tree":
        depth = max(int(np.ceil(np.log2(len(corners) / LEAF))), 0)
        order, middle = np.arange(len(corners)), corners.mean(axis=1)
        nodes = [order]
        for _ in range(depth):
            halves = []
            for part in nodes:
                axis = np.ptp(middle[part], axis=0).argmax()
                cut = len(part) // 2
                split = np.argpartition(middle[part, axis], cut)
                halves += [part[split[:cut]], part[split[cut:]]]
            nodes = halves
        size = max(map(len, nodes))
        index = np.stack([np.resize(part, size) for part in nodes])
        count = np.asarray([len(part) for part in nodes])
        weight = (np.arange(size)[None] < count[:, None]).astype(np.float64)
        normal = _normals(corners) / 2
        levels = []
        for level in range(depth + 1):
            group = 2 ** (depth - level)
            rows, keep = index.reshape(-1, group * size), weight.reshape(-1, group * size)
            area = np.linalg.norm(normal[rows], axis=-1) * keep
            centre = (area[..., None] * middle[rows]).sum(1) / area.sum(1)[:, None]
            reach = np.linalg.norm(corners[rows] - centre[:, None, None], axis=-1)
            dipole = (normal[rows] * keep[..., None]).sum(1)
            levels.append((centre, reach.max(axis=(1, 2)), dipole))
        parts = (np.concatenate(x) for x in zip(*levels, strict=True))
        return cls(*parts, leaves=corners[index], weight=weight)

    def unsigned_distance(self, points: np.ndarray, bound: np.ndarray) -> np.ndarray:
        """Distances that are at most ``bound``, which must be reached by some triangle."""
        best = bound * (1 + 1e-12)
        for point, leaf in self._descend(points, lambda p, n: self._gap(points, p, n) <= best[p]):
            triangles = self.leaves[leaf]
            found = _triangle_distance(points[point][:, None], triangles).min(axis=1)
            np.minimum.at(best, point, found)
        return best

    def winding(self, points: np.ndarray) -> np.ndarray:
        """Sums of solid angles over 4 pi, far groups as dipoles."""
        total = np.zeros(len(points))

        def near(point: np.ndarray, node: np.ndarray) -> np.ndarray:
            away = self.centre[node] - points[point]
            length = np.linalg.norm(away, axis=-1)
            far = length > FAR * self.radius[node]
            lone = np.sum(away * self.dipole[node], axis=-1)[far] / length[far] ** 3
            total[:] += np.bincount(point[far], lone, minlength=len(points))
            return ~far

        for point, leaf in self._descend(points, near):
            angle = _solid_angle(points[point][:, None], self.leaves[leaf]) * self.weight[leaf]
            total += np.bincount(point, angle.sum(axis=1), minlength=len(points))
        return total / (4 * np.pi)

    def _gap(self, points: np.ndarray, point: np.ndarray, node: np.ndarray) -> np.ndarray:
        return np.linalg.norm(self.centre[node] - points[point], axis=-1) - self.radius[node]

    def _descend(self, points: np.ndarray, keep) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (point, leaf) whose nodes on the way down all satisfy ``keep(point, node)``."""
        point = np.arange(len(points))
        node = np.zeros(len(points), np.int64)
        while True:
            kept = keep(point, node)
            point, node = point[kept], node[kept]
            if not len(point):
                return
            if node[0] >= self.first_leaf:
                break
            point = np.concatenate([point, point])
            node = np.concatenate([2 * node + 1, 2 * node + 2])
        for rows in _chunks(len(point)):
            yield point[rows], node[rows] - self.first_leaf


def load_mesh(path: str | pathlib.Path) -> Mesh:
    """The triangles of an OBJ file, faces of more corners cut into fans, scaled into [-0.9, 0.9]^3.

    Warns (UserWarning) if the mesh is open: its inside is then where the generalised winding number
    exceeds 1/2, which closes holes with a smooth cap.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, a damaged line, or a mesh that is empty.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() != ".obj":
        raise ValueError(f"{path.name} is no OBJ file: convert the mesh to .obj first.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no mesh {path}: check the path.")
    vertices: list[list[float]] = []
    triangles: list[list[int]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        kind, *words = line.split() or ["#"]
        try:
            if kind == "v":
                vertices.append([float(w) for w in words[:3]])
                if len(vertices[-1]) < 3:
                    raise ValueError("fewer than three coordinates")
            elif kind == "f":
                face = [int(w.split("/")[0]) for w in words]
                if len(face) < 3 or 0 in face:
                    raise ValueError("a face needs three corners, numbered from 1")
                # Negative numbers count back from the last vertex so far.
                face = [i - 1 if i > 0 else len(vertices) + i for i in face]
                triangles += [[face[0], a, b] for a, b in itertools.pairwise(face[1:])]
        except ValueError as error:
            raise ValueError(f"{path.name} line {number} cannot be read: {error}.") from error
    mesh = Mesh(
        np.asarray(vertices, np.float64).reshape(-1, 3),
        np.asarray(triangles, np.int64).reshape(-1, 3),
    )
    if mesh.boundary_edges:
        warnings.warn(
            f"{path.name} is open ({mesh.boundary_edges} boundary edges): inside is where its "
            "generalised winding number exceeds 1/2.",
            stacklevel=2,
        )
    return mesh.scaled()


def _chunks(count: int, size: int = 60_000) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _normals(corners: np.ndarray) -> np.ndarray:
    """Normals, twice the area long."""
    a, b, c = (corners[..., i, :] for i in range(3))
    return np.cross(b - a, c - a)


def _solid_angle(point: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed solid angle of triangles (Van Oosterom and Strackee); 0 for a point in their plane."""
    a, b, c = (corners[..., i, :] - point for i in range(3))
    la, lb, lc = (np.linalg.norm(v, axis=-1) for v in (a, b, c))
    above = np.sum(a * np.cross(b, c), axis=-1)
    beside = (
        la * lb * lc
        + np.sum(a * b, axis=-1) * lc
        + np.sum(b * c, axis=-1) * la
        + np.sum(c * a, axis=-1) * lb
    )
    return 2 * np.arctan2(above, beside)


def _triangle_distance(point: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Distance of points to triangles: to the plane if the foot lies inside, else to an edge."""
    normal = _normals(corners)
    edges, inside = [], True
    for i in range(3):
        start, along = corners[..., i, :], corners[..., (i + 1) % 3, :] - corners[..., i, :]
        to_point = point - start
        inside &= np.sum(np.cross(normal, along) * to_point, axis=-1) >= 0
        part = np.sum(to_point * along, axis=-1) / np.sum(along * along, axis=-1)
        foot = to_point - np.clip(part, 0, 1)[..., None] * along
        edges.append(np.sum(foot * foot, axis=-1))
    height = np.sum((point - corners[..., 0, :]) * normal, axis=-1)
    plane = height**2 / np.sum(normal * normal, axis=-1)
    return np.sqrt(np.where(inside, plane, np.minimum.reduce(edges)))
