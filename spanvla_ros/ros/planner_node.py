"""The planner: newest pictures in, one plan for each anchor picture out, reasoning in between.

Callbacks store inputs; one worker thread decodes, observes, plans and then reasons in slices
until the next anchor picture comes, so that the middleware never waits for inference and
inference never waits for words. A bad input or a failing model is a line in `/diagnostics`,
never the end of the process.
"""

from __future__ import annotations

import gc
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import String
from std_srvs.srv import Trigger

from spanvla_ros.model.checkpoint import load_model_dir
from spanvla_ros.ros.camera_inputs import CameraInputs
from spanvla_ros.ros.diagnostics import (
    ERROR,
    OK,
    WARN,
    DiagnosticsPublisher,
    StageMeter,
    status,
)
from spanvla_ros.ros.extrinsics import Extrinsics
from spanvla_ros.ros.overlay import draw_overlay, reasoning_json
from spanvla_ros.ros.parameters import PlannerSettings, declare
from spanvla_ros.ros.planner_inputs import PlannerInputs
from spanvla_ros.ros.process import keep_freed_memory, run_node
from spanvla_ros.ros.quiet import QuietNode
from spanvla_ros.runtime.engines import Engine
from spanvla_ros.runtime.observations import ObservationBuilder
from spanvla_ros.runtime.planner import Planner
from spanvla_ros.runtime.thinking import ThinkLimits
from spanvla_ros.types import CameraFrame, Plan, SpanvlaError

RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)


class PlannerNode(QuietNode, LifecycleNode):
    """Lifecycle node `planner`: configure loads and warms up, activate plans."""

    def __init__(self) -> None:
        """Declare parameters and the topics that do not depend on the model."""
        super().__init__('planner')
        keep_freed_memory()
        self.settings = declare(self, PlannerSettings, self._on_settings)
        self._model: Planner | None = None
        self._next_model: Planner | None = None
        self._cameras: CameraInputs | None = None
        self._extrinsics: Extrinsics | None = None
        self._active = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._stages = StageMeter()
        self._resets_seen = 0
        self._plan_fault, self._plan_fault_s = '', -np.inf
        self._degraded: tuple[str, ...] = ()
        self._agreed: deque[bool] = deque(maxlen=self.settings.think_window)
        self._plans = 0
        self._loading = ''
        self._overlay_s = -np.inf
        self._reasoning_stamp_ns: int | None = None
        self._make_topics()

    def _make_topics(self) -> None:
        self._plan_out = self.create_publisher(String, 'plan', RELIABLE)
        self._reasoning_out = self.create_publisher(String, 'output/reasoning', RELIABLE)
        self._overlay_out = self.create_publisher(
            CompressedImage, 'output/overlay/compressed', RELIABLE
        )
        self._inputs = PlannerInputs(self, self.settings)
        self.create_service(Trigger, '~/reload_model', self._on_reload_model)
        self._diagnostics = DiagnosticsPublisher(self)
        self.create_timer(1.0, self._publish_diagnostics)

    # Lifecycle.

    def on_configure(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Verify, load and warm up the model, then subscribe to its cameras."""
        self._loading = ''
        try:
            self._model = model = self._load()
            extrinsics = Extrinsics(self, self.settings, model.config.cameras)
        except SpanvlaError as error:
            self.get_logger().error(str(error))
            self._loading = str(error)
            return TransitionCallbackReturn.FAILURE
        settings = self.settings
        self._inputs.use(
            ObservationBuilder(
                model.config,
                settings.sync_tolerance_ms / 1e3,
                missing_camera=settings.missing_camera,
                last_valid_max_age_s=settings.last_valid_max_age_s,
            )
        )
        self._extrinsics = extrinsics
        self._cameras = CameraInputs(self, model.config.cameras, settings, extrinsics)
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name='planner', daemon=True)
        self._thread.start()
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Plan from the next anchor picture on."""
        self._active.set()
        self.get_logger().info('active')
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Stop planning; the guardian brings the vehicle to a stop."""
        self._active.clear()
        return TransitionCallbackReturn.SUCCESS

    def on_cleanup(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Forget model and cameras."""
        self._end_worker()
        self._inputs.use(None)
        self._model = None
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """End the worker."""
        self._end_worker()
        return TransitionCallbackReturn.SUCCESS

    def start(self) -> None:
        """Configure and activate; a model that does not load ends the process with a sentence."""
        for trigger in (self.trigger_configure, self.trigger_activate):
            if trigger() != TransitionCallbackReturn.SUCCESS:
                raise SpanvlaError(self._loading or 'planner: the lifecycle transition failed')

    def _end_worker(self) -> None:
        self._active.clear()
        self._stop.set()
        if self._cameras is not None:
            self._cameras.wake()
        if self._thread is not None:
            self._thread.join(timeout=2.0)
            self._thread = None
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None
        if self._extrinsics is not None:
            self._extrinsics.close()
            self._extrinsics = None

    def close(self) -> None:
        """End the worker before the node goes."""
        self._end_worker()

    # The model.

    def _load(self) -> Planner:
        settings = self.settings
        planner = Planner.open(
            settings.model_dir,
            settings.backend
            if settings.precision == 'fp32'
            else f'{settings.backend}:{settings.precision}',
            schedule=None if settings.schedule == 'model' else settings.schedule,
            steps=settings.steps or None,
            vision_every=settings.vision_every,
            limits=ThinkLimits(
                settings.think_tokens, settings.think_budget, settings.think_window
            ),
            frame_id=settings.output_frame,
        )
        # What is loaded now stays: the collector need not look at it again in every pass.
        gc.collect()
        gc.freeze()
        self.get_logger().info(
            f'{settings.model_dir}: {planner.model_sha256[:12]} on {planner.backend.name}'
        )
        return planner

    def _on_reload_model(
        self, _request: Trigger.Request, response: Trigger.Response
    ) -> Trigger.Response:
        if self._model is None or self._loading:
            response.success = False
            response.message = self._loading or 'the planner is not configured'
            return response
        try:
            directory = load_model_dir(self.settings.model_dir)
        except SpanvlaError as error:
            response.success, response.message = False, str(error)
            return response
        if directory.config.cameras != self._model.config.cameras:
            response.success = False
            response.message = 'the new model has other cameras; configure the node again'
            return response
        self._loading = f'loading {directory.sha256[:12]}'
        threading.Thread(target=self._reload, name='reload', daemon=True).start()
        response.success, response.message = True, self._loading
        return response

    def _reload(self) -> None:
        """Load beside the running model; the worker takes it over between two plans."""
        try:
            self._next_model = self._load()
        except Exception as error:
            # Whatever it was, the old model goes on.
            self._note_fault(f'reload: {type(error).__name__}: {error}')
        finally:
            self._loading = ''

    def _on_settings(self, settings: PlannerSettings) -> None:
        self.settings = settings
        if self._model is not None:
            self._model.vision_every = settings.vision_every

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    # The worker.

    def _run(self) -> None:
        thinking = False
        while not self._stop.is_set():
            cameras, model = self._cameras, self._model
            if cameras is None or model is None:
                return
            if self._next_model is not None:
                self._model, self._next_model = self._next_model, None
                continue
            try:
                if cameras.wait_for_anchor(0.0 if thinking else 0.2):
                    thinking = self._plan_newest(cameras, model)
                    if thinking and self.settings.reason_quota:
                        # On a machine that is never idle there would be no reasoning at all.
                        model.reason_slice(math.inf, self.settings.reason_quota)
                        thinking = model.busy
                elif thinking:
                    model.reason_slice(self.settings.reason_slice_ms)
                    thinking = model.busy
                else:
                    # Nothing to plan; what is wrong with the other inputs is told all the same.
                    cameras.listen()
                    self._inputs.listen()
            except Exception as error:
                # Whatever it was, the next picture is a new chance; the guardian bridges the gap.
                self._note_fault(f'{type(error).__name__}: {error}')
                self.get_logger().error(self._plan_fault, throttle_duration_sec=5.0)
                thinking = False

    def _plan_newest(self, cameras: CameraInputs, model: Planner) -> bool:
        """Plan from the newest pictures; whether there is something left to reason about."""
        begin_s = time.perf_counter()
        stamp_ns, frames = cameras.take(self.settings.sync_wait_ms / 1e3)
        self._inputs.listen()
        self._inputs.take(frames, cameras.meters)
        if self._inputs.resets != self._resets_seen:
            # Whoever emptied the buffers, thoughts of another time go with them.
            self._resets_seen = self._inputs.resets
            model.reset()
        if stamp_ns is None or not self._active.is_set():
            return False
        observation = self._inputs.observe(stamp_ns)
        if isinstance(observation, str):
            self._note_fault(f'no plan: {observation}')
            return False
        observed_s = time.perf_counter()
        plan = model.plan(observation)
        self._publish(plan, frames, model, (observed_s - begin_s) * 1e3)
        return model.busy

    def _publish(
        self, plan: Plan, frames: list[CameraFrame], model: Planner, observe_ms: float
    ) -> None:
        plan = replace(plan, stage_ms=replace(plan.stage_ms, observe_ms=observe_ms))
        self._plan_out.publish(String(data=plan.to_json()))
        self._plans += 1
        self._degraded = plan.degraded
        if plan.agreement is not None:
            self._agreed.append(plan.agreement)
        stages = plan.stage_ms
        self._stages.add(
            {
                'observe_ms': stages.observe_ms,
                'vision_ms': stages.vision_ms,
                'prefill_ms': stages.prefill_ms,
                'reason_ms': stages.reason_ms,
                'step_ms': stages.step_ms,
                'total_ms': stages.total_ms,
            }
        )
        if plan.reasoning_stamp_ns != self._reasoning_stamp_ns:
            self._reasoning_stamp_ns = plan.reasoning_stamp_ns
            self._reasoning_out.publish(String(data=reasoning_json(plan, self._now_ns())))
        now_s = time.monotonic()
        if (now_s - self._overlay_s) * self.settings.overlay_hz >= 1.0:
            self._overlay_s = now_s
            self._publish_overlay(plan, frames, model)

    def _publish_overlay(self, plan: Plan, frames: list[CameraFrame], model: Planner) -> None:
        camera = model.config.cameras[0]
        picture = next((frame.image for frame in frames if frame.camera == camera.name), None)
        if picture is None:
            return
        message = CompressedImage(format='jpeg')
        message.header.frame_id = f'{camera.name}_optical_frame'
        seconds, nanoseconds = divmod(plan.trajectory.stamp_ns, 1_000_000_000)
        message.header.stamp.sec, message.header.stamp.nanosec = seconds, nanoseconds
        message.data.frombytes(draw_overlay(picture, plan, camera))
        self._overlay_out.publish(message)

    # Diagnostics.

    def _note_fault(self, text: str) -> None:
        self._plan_fault, self._plan_fault_s = text, time.monotonic()

    def _publish_diagnostics(self) -> None:
        self._inputs.watch_clock()
        meters = [*self._inputs.meters]
        cameras, model = self._cameras, self._model
        if cameras is not None:
            for intake in cameras.intakes.values():
                meters += [intake.meter, intake.info_meter]
        values = {'plans': str(self._plans), **self._stages.values()}
        if model is not None:
            values |= {
                'model_sha256': model.model_sha256,
                'backend': model.backend.name,
                'engines': _engine_names(model),
                'schedule': model.schedule,
                'pictures_encoded': str(model.pictures_encoded),
                'think_rate': _rate(model.meter.slow_rate),
                'think_alarm': model.meter.alarm,
                'agreement': _share(self._agreed),
                'think_tokens': str(model.meter.drive_tokens),
                'tokens_per_s': f'{model.meter.tokens_per_s:.0f}',
            }
        if self._plan_fault and time.monotonic() - self._plan_fault_s < 5.0:
            level, text = ERROR, self._plan_fault
        elif model is None or self._loading:
            level, text = WARN, self._loading or 'not configured'
        elif self._degraded:
            level, text = WARN, 'degraded: ' + ', '.join(self._degraded)
        elif model.meter.alarm:
            level, text = WARN, model.meter.alarm
        else:
            level, text = OK, 'ok'
        self._diagnostics.publish([status('plan', level, text, values)], meters)


def _engine_names(model: Planner) -> str:
    """Built engines by name, each a hash of all it was built from; none where graphs run."""
    engines: Mapping[str, Engine] = getattr(model.backend, 'engines', {})
    return ' '.join(sorted(engine.path.name for engine in engines.values()))


def _share(said: Sequence[bool]) -> str:
    return _rate(sum(said) / len(said) if said else None)


def _rate(share: float | None) -> str:
    return 'none yet' if share is None else f'{share:.2f}'


def make_planner_node() -> PlannerNode:
    """A planner node, started where `autostart` says so."""
    node = PlannerNode()
    if node.settings.autostart:
        node.start()
    return node


def main() -> int:
    """Plan until a signal."""
    return run_node(make_planner_node)


if __name__ == '__main__':
    sys.exit(main())
