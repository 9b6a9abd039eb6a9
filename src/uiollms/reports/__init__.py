"""What a person looks at: tables and pictures of runs, and the page that report.py writes."""
