"""The ament_python package; the extras say which libraries each use needs."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = 'spanvla_ros'
ROOT = Path(__file__).resolve().parent

ROS_MESSAGES = (
    'builtin',
    'diagnostic',
    'geometry',
    'lifecycle',
    'nav',
    'rosgraph',
    'sensor',
    'std',
    'trajectory',
    'visualization',
)

# A vehicle has its own OpenCV from apt or JetPack, which a wheel would shadow: no default
# install and no `gpu` extra brings one; every extra for a machine without ROS does.
OPENCV = ['opencv-python-headless>=4.8']
ONNX_EXPORT = ['onnx>=1.17', 'onnxscript>=0.5', 'onnxruntime>=1.20']
TOWN = [*OPENCV, 'shapely>=2.0']

EXTRAS = {
    'ros': [
        'ros-rclpy[fastrtps]',
        *(f'ros-{name}-interfaces' for name in ('builtin', 'rcl')),
        *(f'ros-{name}-msgs' for name in ROS_MESSAGES if name != 'builtin'),
        'ros-std-srvs',
        *OPENCV,
    ],
    'onnx': ['onnxruntime>=1.20'],
    'gpu': ['cuda-python>=12.6', 'onnxruntime-gpu>=1.20', 'tensorrt>=10.3'],
    'town': TOWN,
    'train': [
        *TOWN,
        *ONNX_EXPORT,
        'peft>=0.18',
        'pyarrow>=18',
        'tensorboard>=2.18',
        'torch>=2.7',
        'transformers>=5.20',
    ],
    'desktop': ['opencv-python>=4.8'],
    'dev': [
        'beartype>=0.20',
        'catkin-pkg>=1.0',
        'hypothesis>=6.100',
        'import-linter>=2.7',
        'mypy>=1.18',
        'pre-commit>=4.0',
        'pytest>=8,<9',
        'ruff>=0.14',
        'scipy>=1.13',
        'types-PyYAML',
    ],
}


def shared_files() -> list[tuple[str, list[str]]]:
    """Where launch files, parameters and the shipped model go below the install prefix."""
    share = f'share/{PACKAGE}'
    found = [
        ('share/ament_index/resource_index/packages', [f'resource/{PACKAGE}']),
        (share, ['package.xml', 'LICENSE']),
    ]
    for top in ('launch', 'config', 'models'):
        for folder in sorted({path.parent for path in (ROOT / top).rglob('*') if path.is_file()}):
            # Engines are built for one device and belong to it.
            if 'engines' in folder.parts:
                continue
            relative = folder.relative_to(ROOT).as_posix()
            files = sorted(
                f'{relative}/{path.name}' for path in folder.iterdir() if path.is_file()
            )
            found.append((f'{share}/{relative}', files))
    return found


setup(
    name=PACKAGE,
    version='0.1.0',
    description='SpanVLA for ROS 2: train a driving VLA, export it, drive it.',
    license='Apache-2.0',
    maintainer='The spanvla_ros maintainers',
    maintainer_email='maintainers@spanvla-ros.example',
    packages=find_packages(include=[PACKAGE, f'{PACKAGE}.*']),
    package_data={PACKAGE: ['py.typed']},
    data_files=shared_files(),
    python_requires='>=3.10,<3.14',
    install_requires=[
        'jaxtyping>=0.2.34',
        'numpy>=1.26',
        'PyYAML>=5.4',
        'rosbags>=0.10.4',
        'safetensors>=0.4.5',
        'tokenizers>=0.21',
        'tqdm>=4.60',
        'transforms3d>=0.4.2',
    ],
    extras_require=EXTRAS,
    zip_safe=False,
    entry_points={
        'console_scripts': [
            'spanvla = spanvla_ros.cli:main',
            *(
                f'{node}_node = spanvla_ros.ros.{node}_node:main'
                for node in (
                    'planner',
                    'guardian',
                    'follower',
                    'recorder',
                    'town',
                    'carla',
                    'autoware',
                    'bridge',
                    'replay',
                )
            ),
        ],
    },
)
