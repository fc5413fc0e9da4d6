"""Cold-start data: text reasoning in, code-augmented traces out, every block executed and every answer verified."""

from data_gen.generate import DataError, Report, generate
from data_gen.inspection import inspect
from data_gen.trace import Segment, Trace, load_traces, trace_to_transcript

__all__ = ["DataError", "Report", "Segment", "Trace", "generate", "inspect", "load_traces", "trace_to_transcript"]
