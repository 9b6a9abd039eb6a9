"""The JSON configs as typed sections: experiments, compressors and evaluation tasks."""
