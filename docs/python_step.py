# On-policy distillation from Python. 'student' and 'teacher' are folders with a
# run, a Hugging Face or a T5X checkpoint.
import gkd_jax
import jax
import numpy as np
import optax

student, params = gkd_jax.load_model('student')
teacher, teacher_params = gkd_jax.load_model('teacher', dtype='bfloat16')
objective = gkd_jax.Objective(gkd_jax.divergences.reverse_kl)
method = gkd_jax.Method(policy=gkd_jax.policies.student(), objective=objective)
optimizer = optax.adafactor(1e-3)
train_step = gkd_jax.make_train_step(
  student=student, teacher=teacher, method=method, optimizer=optimizer,
  ids=student.config.special_ids(num_ids=40), seed=0,
)
train_step = jax.jit(train_step, donate_argnums=0)
state = gkd_jax.init_state(params, optimizer, method)
x = np.array([[17, 8, 25, 1], [30, 9, 1, 0]])  # inputs with EOS, then padding
batch = gkd_jax.Batch(x, np.zeros((2, 8), int), np.ones((2, 8)))  # y: up to 8
for _ in range(3):
  state, metrics = train_step(state, gkd_jax.Frozen(teacher_params), batch)
  print(f'step {state.step}: loss {metrics["loss"]:.3f}')

greedy = gkd_jax.SamplerConfig(temperature=0.0)
y = gkd_jax.generate(student, state.params, x, greedy, max_decode_len=8)
print(y.tokens)
