"""The JSON configs as typed sections: environment configs, compressors, tasks."""
