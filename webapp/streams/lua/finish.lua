-- FINISH: put `done` at the end of the log, once, after the commit, and let both keys expire.
-- KEYS 1 state, 2 log. ARGV 1 committed length, 2 SEQ of done, 3 the event's data, 4 reason, 5 TTL in seconds.
local state = redis.call('HMGET', KEYS[1], 'epoch', 'end', 'done', 'fence')
if not state[1] then
  return {'ABSENT'}
end
if tonumber(state[2]) > tonumber(ARGV[1]) then
  return {'BEHIND', state[2]}
end
if not state[3] then
  redis.call('XADD', KEYS[2], ARGV[1] .. '-' .. ARGV[2], 'd', ARGV[3])
  redis.call('HSET', KEYS[1], 'done', 1)
end
if not state[4] then
  redis.call('HSET', KEYS[1], 'fence', ARGV[4], 'fenced_us', 0)
end
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[5])
return {'OK', ARGV[1]}
