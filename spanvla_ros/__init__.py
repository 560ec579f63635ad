"""SpanVLA for ROS 2: train a driving vision-language-action model, export it, drive it."""

__version__ = '0.1.0'
