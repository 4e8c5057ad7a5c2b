"""TensorRT: engines are built and run by ``runner.py``, in this interpreter or in another one."""
