# A step of on-policy distillation from Python: 'student' and 'teacher' are
# folders that hold a run, a Hugging Face or a T5X checkpoint.
import gkd_jax
import jax
import numpy as np
import optax

student, params = gkd_jax.load_model('student')
teacher, teacher_params = gkd_jax.load_model('teacher', dtype='bfloat16')
method = gkd_jax.Method(
  policy=gkd_jax.policies.student(),  # the student writes the outputs
  objective=gkd_jax.Objective(gkd_jax.divergences.reverse_kl),
)
optimizer = optax.adafactor(1e-3)
ids = student.config.special_ids(num_ids=40)  # as many as your tokenizer has
train_step = gkd_jax.make_train_step(
  student=student,
  teacher=teacher,
  method=method,
  optimizer=optimizer,
  ids=ids,
  seed=0,
)
train_step = jax.jit(train_step, donate_argnums=0)
state = gkd_jax.init_state(params, optimizer, method)
inputs = np.array([[17, 8, 25, 1], [30, 9, 1, 0]])  # with EOS, then padding
targets = np.zeros((2, 8), int)  # not read; outputs are at most as long
batch = gkd_jax.Batch(inputs, targets, targets)
for _ in range(3):
  state, metrics = train_step(state, gkd_jax.Frozen(teacher_params), batch)
  print(f'step {state.step}: loss {metrics["loss"]:.3f}')
greedy = gkd_jax.SamplerConfig(temperature=0.0)
outputs = gkd_jax.generate(
  student, state.params, inputs, greedy, max_decode_len=8
)
print(outputs.tokens)
