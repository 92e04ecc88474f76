"""Ten stages: eight for each variant of a job, then two for the job."""
