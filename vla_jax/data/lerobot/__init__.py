"""LeRobot datasets: parquet files and videos."""
