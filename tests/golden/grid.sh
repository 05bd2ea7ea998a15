#!/bin/sh
failed=0
deepspeed --num_gpus 2 run_pretraining.py --lr 0.001 --fp16 --curve linear --current_run_id 704a9f2b3042 --max_steps 23000 --do_validation --tokenizer_name 'bert-large uncased' --layer_norm_type 007 --min_delta -1 --job_name bert_large_experiment || failed=1
deepspeed --num_gpus 2 run_pretraining.py --lr 0.001 --fp16 --curve 'it'"'"'s; rm -rf $HOME' --current_run_id e6988bd7508a --max_steps 23000 --do_validation --tokenizer_name 'bert-large uncased' --layer_norm_type 007 --min_delta -1 --job_name bert_large_experiment || failed=1
deepspeed --num_gpus 2 run_pretraining.py --lr 0.001 --curve linear --current_run_id 711774748255 --max_steps 23000 --do_validation --tokenizer_name 'bert-large uncased' --layer_norm_type 007 --min_delta -1 --job_name bert_large_experiment || failed=1
deepspeed --num_gpus 2 run_pretraining.py --lr 0.001 --curve 'it'"'"'s; rm -rf $HOME' --current_run_id 65f8ecd9e73a --max_steps 23000 --do_validation --tokenizer_name 'bert-large uncased' --layer_norm_type 007 --min_delta -1 --job_name bert_large_experiment || failed=1
deepspeed --num_gpus 2 run_pretraining.py --lr 0.0005 --fp16 --curve linear --current_run_id 694266531392 --max_steps 23000 --do_validation --tokenizer_name 'bert-large uncased' --layer_norm_type 007 --min_delta -1 --job_name bert_large_experiment || failed=1
deepspeed --num_gpus 2 run_pretraining.py --lr 0.0005 --fp16 --curve 'it'"'"'s; rm -rf $HOME' --current_run_id 0ba22cf49950 --max_steps 23000 --do_validation --tokenizer_name 'bert-large uncased' --layer_norm_type 007 --min_delta -1 --job_name bert_large_experiment || failed=1
deepspeed --num_gpus 2 run_pretraining.py --lr 0.0005 --curve linear --current_run_id a0b886f28a5b --max_steps 23000 --do_validation --tokenizer_name 'bert-large uncased' --layer_norm_type 007 --min_delta -1 --job_name bert_large_experiment || failed=1
deepspeed --num_gpus 2 run_pretraining.py --lr 0.0005 --curve 'it'"'"'s; rm -rf $HOME' --current_run_id 9770f0db9b89 --max_steps 23000 --do_validation --tokenizer_name 'bert-large uncased' --layer_norm_type 007 --min_delta -1 --job_name bert_large_experiment || failed=1
exit $failed
