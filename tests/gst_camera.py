"""Plays a film as a camera would, by GStreamer's RTSP server: `python3 gst_camera.py FILM PORT`.

Run by the system's Python, where Debian's packages put its bindings (see tests/test_live_gstreamer.py).
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402


def main(film: str, port: str) -> None:
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(port)
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(f"( filesrc location={film} ! qtdemux ! h264parse ! rtph264pay name=pay0 pt=96 )")
    server.get_mount_points().add_factory("/gate", factory)
    server.attach(None)
    print("ready", flush=True)
    GLib.MainLoop().run()


main(*sys.argv[1:])
