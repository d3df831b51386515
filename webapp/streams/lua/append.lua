-- APPEND: put text at the log's end, if the caller owns the session, knows the end, and no fence stands.
-- KEYS 1 state, 2 log. ARGV 1 epoch, 2 start, 3 end (code points), 4 kind ('t' or 'c'), 5 text.
local state = redis.call('HMGET', KEYS[1], 'epoch', 'fence', 'end', 'tlen', 'fenced_us', 'seq')
if not state[1] or tonumber(state[1]) < tonumber(ARGV[1]) then
  return {'ABSENT'} -- also where Redis was emptied and an older epoch was opened since: this one's is gone
end
if state[1] ~= ARGV[1] then
  return {'STALE', state[1]}
end
if state[2] then
  return {'FENCED', state[3], state[4], state[2], state[5]}
end
if state[3] ~= ARGV[2] then
  return {'BEHIND', state[3], state[4]}
end
redis.call('XADD', KEYS[2], ARGV[3] .. '-0', ARGV[4], ARGV[5])
if state[3] == '0' and state[6] == '0' then
  redis.call('PEXPIRE', KEYS[2], redis.call('PTTL', KEYS[1]))
end
if ARGV[4] == 't' then
  redis.call('HSET', KEYS[1], 'end', ARGV[3], 'seq', 0, 'tlen', ARGV[3])
else
  redis.call('HSET', KEYS[1], 'end', ARGV[3], 'seq', 0)
end
return {'OK', ARGV[3]}
