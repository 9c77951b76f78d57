"""Pages as one HTML file that needs nothing else: of runs, and of the demo with its numbers as JSON beside it.

markup -> charts, document -> run_page -> job; facts -> demo_page -> write.
"""

from pipeline.operate.report.charts import Chart, Curve
from pipeline.operate.report.facts import (
    CaptionedPicture,
    GeneratedPicture,
    Reconstruction,
    ReconstructionScores,
    ReportFacts,
    RetrievalScores,
    UnseenPicture,
)
from pipeline.operate.report.write import write_report

__all__ = [
    "CaptionedPicture",
    "Chart",
    "Curve",
    "GeneratedPicture",
    "Reconstruction",
    "ReconstructionScores",
    "ReportFacts",
    "RetrievalScores",
    "UnseenPicture",
    "write_report",
]
