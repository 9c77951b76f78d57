"""The report of a run: one HTML file that needs nothing else, and its numbers as JSON beside it.

facts -> markup, charts -> page -> write.
"""

from pipeline.operate.report.facts import (
    CaptionedPicture,
    Chart,
    Curve,
    GeneratedPicture,
    Pixels,
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
    "Pixels",
    "Reconstruction",
    "ReconstructionScores",
    "ReportFacts",
    "RetrievalScores",
    "UnseenPicture",
    "write_report",
]
