"""Self-contained HTML pages, and the reader that measures a drive from its recording alone."""
