"""What stage=analyze and stage=report share: reading a run's folder, streaming statistics, figures and the page."""
